import contextlib
import os

# Most of a test is compiling: the passes over the program stay, LLVM's do not. Set for
# the processes that tests start, too.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import hypothesis
import jax
import jaxlib
import pytest

# These halve it once more. A flag that an XLA does not know ends the process.
if jaxlib.version.__version_info__ < (0, 11):
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
    )

hypothesis.settings.register_profile(
    "gradsmooth", deadline=None, derandomize=True, max_examples=25, database=None
)
hypothesis.settings.load_profile("gradsmooth")


def pytest_collection_modifyitems(items):
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker("core")
        if item.path.parent.name in ("benchmarks", "pages"):
            item.add_marker("slow")  # the desk is for work on the library


@contextlib.contextmanager
def _enable_x64():
    # By the flag: the context manager's name differs between versions of jax.
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


@pytest.fixture(scope="session")
def enable_x64():
    """A context manager factory: `with enable_x64(): ...`."""
    return _enable_x64
