"""The authors' formula in PyTorch, eager and compiled, beside ours on the same card."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax

from benchmarks.cost.cpu.peers import twins_of
from benchmarks.cost.cpu.updates import LIMIT, limit, smoothings, updates_of
from benchmarks.on_gpu.session import Session, applied

_OURS = ("window(0.2)", "window(0.2), norm_preserving")
# The most that one function may compile; the first one loads the compiler, too.
_COMPILE_SECONDS = 25.0


def peers(session: Session, megabytes: float, layout: str) -> None:
    """Times the authors' formula in PyTorch, eager and compiled, beside ours."""
    import torch  # pyright: ignore[reportMissingImports] # optional

    on_card = torch.cuda.is_available()
    if not on_card and not session.report["options"]["quick"]:
        raise RuntimeError("PyTorch sees no card")
    updates = updates_of(megabytes, session.plan.layers, layout)
    us: Any = [
        torch.randn(leaf.shape, device="cuda" if on_card else "cpu")
        for leaf in jax.tree.leaves(updates)
    ]
    if layout == "stacked":
        (us,) = us

    def scaled(us: Any, _: float) -> Any:
        return 0.9 * us if layout == "stacked" else torch._foreach_mul(us, 0.9)

    def repeated(function: Callable) -> Callable[[int], None]:
        def run(calls: int) -> None:
            for _ in range(calls):
                function(us, 0.2)
            if on_card:
                torch.cuda.synchronize()

        return run

    where = f"{megabytes:g} MB, {layout}"
    calls = {f"PyTorch: {LIMIT}": repeated(scaled)}
    for name, twin in twins_of(layout).items():
        calls[name] = repeated(twin)
        if megabytes != session.plan.megabytes[0]:
            continue  # compiling takes longer than all else
        compiled = repeated(torch.compile(twin))
        name = name.replace(":", ", compiled:")
        try:
            with _at_most(min(_COMPILE_SECONDS, session.left() - 5)):
                compiled(1)
            calls[name] = compiled
        except Exception as error:
            session.skip(f"peers {where}", name, error)
    functions = {LIMIT: limit, **{n: smoothings(layout)[n] for n in _OURS}}
    cases = {name: applied(f, updates) for name, f in functions.items()}
    found = session.measure(f"peers {where}", cases, LIMIT, others=calls)
    session.report["peers"][where] = found


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises `TimeoutError` in what takes longer; a compiler of PyTorch is Python."""
    if seconds <= 0:
        raise TimeoutError("no time left to compile it")

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not compiled in {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
