"""`gradsmooth_optax.plots`: what is drawn, where, whether it can be read; errors."""

import functools
import os
import re
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import gradsmooth_optax as gs
from gradsmooth_optax import diagnostics, plots
from gradsmooth_optax.diagnostics import DepthRecord, DepthStatistics, RoleStatistics

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402 # after the skip and the backend
from matplotlib.colors import to_hex  # noqa: E402 # after the skip
from matplotlib.figure import Figure  # noqa: E402 # after the skip
from matplotlib.patches import PathPatch  # noqa: E402 # after the skip

SCANNED = gs.scanned("blocks/")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


# What is drawn.


def role_statistics(rng, time, num_layers):
    return RoleStatistics(
        norms=rng.uniform(1, 2, (*time, num_layers)),
        cosines=rng.uniform(-0.5, 1, (*time, num_layers - 1)),
        roughness=rng.uniform(5, 6, time),
        relative_roughness=rng.uniform(0.5, 1.5, time),
    )


def record_of(steps, num_layers=6, stacks=("blocks",), roles=("w", "mlp/kernel")):
    """A record; with a time axis for several steps."""
    rng = np.random.default_rng(np.size(steps))
    of = functools.partial(role_statistics, rng, np.shape(steps), num_layers)
    both = (
        {s: DepthStatistics(*of(), roles={r: of() for r in roles}) for s in stacks}
        for _ in range(2)
    )
    return DepthRecord(np.asarray(steps, np.int32), *both)


def as_list(record):
    """One record for each step."""
    return [jax.tree.map(lambda x, t=t: x[t], record) for t in range(len(record.step))]


@functools.cache
def updates_of(num_layers):
    """Each layer's update correlated with its neighbors', the halves with signs."""
    steps = np.random.default_rng(0).normal(size=(num_layers, 32))
    u = np.cumsum(steps, axis=0)
    u[: num_layers // 2] *= -1
    return {"blocks": {"w": u.astype(np.float32)}}


def cosines_of(updates):
    u = updates["blocks"]["w"].astype(np.float64)
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    return u @ u.T


def arms():
    rng = np.random.default_rng(0)
    long = "norm-preserving window(0.2), with norms of whole blocks"
    means = {"window(0.2)": -0.013, long: 0.0, "mean over depth": 0.03}
    return {name: rng.normal(mean, 0.02, 16) for name, mean in means.items()}


@functools.cache
def signal():
    rng = np.random.default_rng(0)
    batches = [
        {"h": {"a": 1 + rng.normal(size=(4, 50)), "b": rng.normal(size=(4, 50))}}
        for _ in range(16)
    ]
    return diagnostics.depth_signal(batches, gs.scanned("h/"))


DRAW = {
    "operator_matrix": lambda **kw: plots.operator_matrix(gs.window(0.2), 12, **kw),
    "operator_matrix of a long name": lambda **kw: plots.operator_matrix(
        gs.controls.shuffled(gs.compose(gs.ema(0.5), gs.repeat(gs.window(0.2), 8)), 1),
        24,
        **kw,
    ),
    "operator_matrix of 200": lambda **kw: plots.operator_matrix(
        gs.laplacian(0.5), 200, **kw
    ),
    "cosine_matrix": lambda **kw: plots.cosine_matrix(updates_of(12), SCANNED, **kw),
    "depth_signal": lambda **kw: plots.depth_signal(signal(), **kw),
    "roughness_over_training": lambda **kw: plots.roughness_over_training(
        record_of(range(0, 200_000, 500)), role="mlp/kernel", **kw
    ),
    "cosines_over_training": lambda **kw: plots.cosines_over_training(
        record_of(range(100), stacks=["params/decoder/layers"]), **kw
    ),
    "layer_norms": lambda **kw: plots.layer_norms(record_of(3), **kw),
    "paired_differences": lambda **kw: plots.paired_differences(arms(), **kw),
}
FUNCTIONS = [name for name in DRAW if " of " not in name]


# Every function.


class Picture(NamedTuple):
    ax: Any
    is_current: bool
    settings_stay: bool


@pytest.fixture(scope="module", params=DRAW)
def picture(request):
    """The Axes of a new figure, laid out; drawn once for all that look at it."""
    plt.close("all")
    before = dict(matplotlib.rcParams)
    ax = DRAW[request.param]()
    is_current = plt.get_fignums() == [ax.figure.number] and plt.gca() is ax
    settings_stay = dict(matplotlib.rcParams) == before
    ax.figure.draw_without_rendering()
    return Picture(ax, is_current, settings_stay)


def test_a_new_figure_is_pyplots_own_so_that_a_notebook_shows_it(picture):
    assert picture.is_current


def test_global_settings_of_matplotlib_stay_as_they_are(picture):
    assert picture.settings_stay


def test_nothing_is_cut_off_and_titles_and_legends_cover_nothing(picture):
    ax, figure = picture.ax, picture.ax.figure
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) >= 0
    assert box.x1 <= width
    assert box.y1 <= height
    title, data = ax.title.get_window_extent(), ax.get_window_extent()
    assert title.y0 >= data.y1
    if ax.get_legend() is not None:
        legend = ax.get_legend().get_window_extent()
        assert data.y1 <= legend.y0
        assert legend.y1 <= title.y0 + 3  # of a frame that is not drawn


def test_axes_have_labels_a_title_and_few_ticks_whose_texts_do_not_overlap(picture):
    ax = picture.ax
    assert ax.get_title()
    assert ax.get_xlabel()
    for axis, span in ((ax.xaxis, ("x0", "x1")), (ax.yaxis, ("y0", "y1"))):
        low, high = sorted(axis.get_view_interval())
        labels = [
            tick.label1.get_window_extent()
            for tick in axis.get_major_ticks()
            if low <= tick.get_loc() <= high and tick.label1.get_text()
        ]
        assert 1 < len(labels) <= 13
        spans = sorted(tuple(getattr(label, s) for s in span) for label in labels)
        ends, starts = [s[1] for s in spans[:-1]], [s[0] for s in spans[1:]]
        assert all(np.array(ends) <= np.array(starts))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_draws_into_the_axes_that_it_is_given_and_makes_no_figure(name):
    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    assert DRAW[name](ax=right) is right
    assert right.has_data()
    assert not any((left.has_data(), left.texts, left.get_title()))
    assert plt.get_fignums() == []
    # At most a color bar is added.
    added = [ax for ax in figure.axes if ax not in (left, right)]
    assert len(added) == bool(right.images)


def test_without_matplotlib_every_function_says_what_to_install(monkeypatch):
    signal()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in FUNCTIONS:
        with pytest.raises(ImportError) as info:
            DRAW[name]()
        message = str(info.value)
        assert f"`plots.{name}` needs matplotlib" in message
        assert '`python -m pip install "gradsmooth_optax[plots]"`' in message


def test_a_matplotlib_that_is_there_but_broken_says_so_itself(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"matplotlib\.pyplot"):
        plots.operator_matrix(gs.window(0.2), 3)


def test_the_import_leaves_matplotlib_alone_and_drawing_needs_no_display():
    code = """if True:
        import sys
        from gradsmooth_optax import plots, window
        assert "matplotlib" not in sys.modules
        ax = plots.paired_differences({"a": [1.0, 2.0]})
        ax.figure.savefig(sys.stdout.buffer)
    """
    displays = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    env = {k: v for k, v in os.environ.items() if k not in displays}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(b"\x89PNG")


# Heat maps.


def window_matrix(alpha, num_layers):
    s = (1 - alpha) * np.eye(num_layers)
    s += alpha / 2 * (np.eye(num_layers, k=1) + np.eye(num_layers, k=-1))
    s[0, 0] = s[-1, -1] = 1 - alpha / 2
    return s


@pytest.mark.parametrize("num_layers", [2, 12, 200])
def test_the_picture_of_an_operator_is_its_matrix_row_by_row(num_layers):
    ax = plots.operator_matrix(gs.window(0.2), num_layers)
    (image,) = ax.images
    np.testing.assert_allclose(image.get_array(), window_matrix(0.2, num_layers))
    assert image.origin == "upper"
    assert ax.get_ylabel() == "layer that receives"
    assert ax.get_xlabel() == "from layer"


def test_rows_are_what_receives_also_of_zeros_and_of_one_layer():
    for operator, wanted in (
        (gs.operator_fn(lambda n: np.eye(n)[[0] * n]), np.eye(3)[[0, 0, 0]]),
        (gs.dense(np.zeros((3, 3))), np.zeros((3, 3))),
        (gs.ema(0.5), np.ones((1, 1))),
    ):
        ax = plots.operator_matrix(operator, len(wanted))
        np.testing.assert_array_equal(ax.images[0].get_array(), wanted)


def test_a_schedule_is_drawn_at_a_step():
    ax = plots.operator_matrix(scheduled().at(10), 12)
    s = window_matrix(0.2, 12)
    np.testing.assert_allclose(ax.images[0].get_array(), s @ s, atol=1e-6)


def test_a_weight_has_one_color_in_the_pictures_of_all_operators():
    operators = (gs.window(0.2), gs.laplacian(0.5), gs.mean_over_depth())
    images = [plots.operator_matrix(of, 24).images[0] for of in operators]
    for image in images:
        colors = image.cmap(image.norm([-1, -0.1, 0, 0.1, 0.5, 1]))
        expected = images[0].cmap(images[0].norm([-1, -0.1, 0, 0.1, 0.5, 1]))
        np.testing.assert_array_equal(colors, expected)
        assert image.norm(0) == 0.5
        assert image.norm(0.25) - 0.5 == pytest.approx(0.25)  # by the square root
        assert image.figure.axes[1].get_ylim() == (-1, 1)
    wide = plots.operator_matrix(gs.dense(np.diag([4.0, 1.0, 1.0])), 3)
    assert wide.images[0].get_clim() == (-4, 4)


def test_few_layers_have_numbers_in_the_cells_that_are_not_zero():
    ax = plots.operator_matrix(gs.window(0.05), 3)
    written = {text.get_position(): text.get_text() for text in ax.texts}
    assert written.pop((2, 0)) == written.pop((0, 2)) == ""
    assert written == {
        **{(0, 0): ".975", (1, 0): ".025"},
        **{(0, 1): ".025", (1, 1): ".95", (2, 1): ".025"},
        **{(1, 2): ".025", (2, 2): ".975"},
    }


def test_numbers_in_cells_are_read_on_dark_and_on_light_and_fit_in():
    ax = plots.operator_matrix(gs.laplacian(0.25), 12)
    ax.figure.draw_without_rendering()
    cell = ax.get_window_extent().width / 12
    image = ax.images[0]
    assert len(ax.texts) == 12 * 12
    for text in ax.texts:
        column, row = text.get_position()
        *rgb, _ = image.cmap(image.norm(image.get_array()[row, column]))
        gray = np.dot(rgb, [0.299, 0.587, 0.114])
        assert (text.get_color() == "white") == (gray < 0.5)
        assert text.get_window_extent().width < cell


def test_many_layers_or_little_room_have_no_numbers_and_no_hatches_where_none_is_due():
    many = plots.operator_matrix(gs.window(0.2), 13)
    assert not many.texts
    assert not many.patches
    small = Figure(figsize=(2, 2)).subplots()
    assert not plots.operator_matrix(gs.window(0.2), 12, ax=small).texts


def hatched_cells(ax):
    (patch,) = [p for p in ax.patches if isinstance(p, PathPatch)]
    assert patch.get_hatch()
    corners = patch.get_path().vertices.reshape(-1, 5, 2)
    return {tuple(center) for center in corners[:, [0, 2]].mean(1)[:, ::-1]}


@pytest.mark.parametrize("num_layers", [12, 200])
def test_cosines_of_all_pairs_of_layers_are_on_a_fixed_scale(num_layers):
    ax = plots.cosine_matrix(updates_of(num_layers), SCANNED)
    cosines = cosines_of(updates_of(num_layers))
    np.testing.assert_allclose(ax.images[0].get_array(), cosines, atol=1e-5)
    assert ax.images[0].get_clim() == (-1, 1)
    assert ax.figure.axes[1].get_ylim() == (-1, 1)
    assert ax.get_title() == "cosines of updates: blocks"
    if num_layers > 12:
        # In print negative cells are told from positive ones by hatches.
        certain = np.abs(cosines + 0.1) > 1e-5
        wanted = {tuple(at) for at in np.argwhere(certain & (cosines < -0.1))}
        unsure = {tuple(at) for at in np.argwhere(~certain)}
        assert wanted == hatched_cells(ax) - unsure
        assert ax.figure.axes[1].patches  # and on the color bar


def test_cosines_are_written_with_two_digits_and_zeros_as_well(monkeypatch):
    cosines = np.array([[1.0, -0.6, 0.0], [-0.6, 1.0, 0.125], [-0.004, -0.999, np.nan]])
    found = {"blocks": cosines}
    monkeypatch.setattr(diagnostics, "cosine_matrix", lambda *_, **__: found)
    ax = plots.cosine_matrix(updates_of(12), SCANNED)
    written = [text.get_text() for text in ax.texts]
    assert written == ["1", "-.6", "0", "-.6", "1", ".12", "0", "-1", "nan"]


def test_the_title_names_the_operator_and_the_number_of_layers():
    given = gs.window(jnp.float32(0.25), radius=2)
    title = plots.operator_matrix(given, 3).get_title()
    assert title == "window(0.25, radius=2), L = 3"
    long = gs.compose(*[gs.window(0.1 * i) for i in range(1, 9)])
    title = plots.operator_matrix(long, 24).get_title()
    assert re.fullmatch(r"compose\(.{20,40}\n.{20,46} …, L = 24", title)


# Over training.


def drawn(ax):
    """{label: (x, y)} of the lines that the legend has."""
    return {
        line.get_label(): (np.asarray(line.get_xdata()), np.asarray(line.get_ydata()))
        for line in ax.lines
        if not line.get_label().startswith("_")
    }


def assert_drawn(ax, steps, before, after):
    lines = drawn(ax)
    assert list(lines) == ["before smoothing", "after smoothing"]
    for (x, y), wanted in zip(lines.values(), (before, after), strict=True):
        np.testing.assert_array_equal(x, steps)
        np.testing.assert_allclose(y, wanted, rtol=1e-12)


def parts_of(record, role=None):
    blocks = record.before["blocks"], record.after["blocks"]
    return [block.roles[role] if role else block for block in blocks]


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("role", [None, "w"])
def test_roughness_is_drawn_against_the_step(role, relative):
    record = record_of([0, 10, 20, 30])
    field = "relative_roughness" if relative else "roughness"
    wanted = [getattr(part, field) for part in parts_of(record, role)]
    for form in (record, as_list(record)):
        ax = plots.roughness_over_training(form, role=role, relative=relative)
        assert_drawn(ax, [0, 10, 20, 30], *wanted)
    assert ax.get_ylim()[0] == 0
    what = field.replace("_", " ")
    assert ax.get_title() == f"{what} of updates: blocks{', w' if role else ''}"


@pytest.mark.parametrize("role", [None, "mlp/kernel"])
def test_cosines_are_drawn_as_mean_and_range_over_pairs(role):
    record = record_of([0, 10, 20])
    cosines = [part.cosines for part in parts_of(record, role)]
    for form in (record, as_list(record)):
        ax = plots.cosines_over_training(form, role=role)
        assert_drawn(ax, [0, 10, 20], *(c.mean(1) for c in cosines))
    assert len(ax.collections) == 2
    for band, of in zip(ax.collections, cosines, strict=True):
        corners = {tuple(v) for v in band.get_paths()[0].vertices.tolist()}
        edges = zip([0, 10, 20] * 2, [*of.min(1), *of.max(1)], strict=True)
        assert corners == set(edges)


@pytest.mark.parametrize("num_layers", [2, 200])
def test_norms_are_drawn_against_the_layer(num_layers):
    record = record_of(30, num_layers)
    for role in (None, "w"):
        ax = plots.layer_norms(record, role=role)
        norms = [part.norms for part in parts_of(record, role)]
        assert_drawn(ax, np.arange(num_layers), *norms)
    assert ax.get_ylim()[0] == 0
    assert "at step 30: blocks" in ax.get_title()


def test_what_a_scan_of_a_monitored_optimizer_gives_can_be_drawn_as_it_is():
    updates = updates_of(12)
    smooth = gs.smooth_over_depth(SCANNED, 0.5)
    tx = optax.chain(
        diagnostics.monitor_depth(smooth, SCANNED, every=2), optax.scale(-1.0)
    )

    @jax.jit
    def run(updates, factors):
        def step(state, factor):
            _, state = tx.update(jax.tree.map(lambda u: factor * u, updates), state)
            return state, diagnostics.monitored(state)

        return jax.lax.scan(step, tx.init(updates), factors)

    state, records = run(updates, jnp.arange(1.0, 7.0))
    ax = plots.roughness_over_training(records, relative=False)
    u = updates["blocks"]["w"].astype(np.float64)
    of = [np.sum(np.diff(x, axis=0) ** 2) for x in (u, window_matrix(0.5, 12) @ u)]
    for (x, y), roughness in zip(drawn(ax).values(), of, strict=True):
        np.testing.assert_array_equal(x, [0, 2, 4])  # each once
        np.testing.assert_allclose(y, roughness * np.array([1, 9, 25]), rtol=1e-5)
    ax = plots.layer_norms(diagnostics.monitored(state))
    norms = 5 * np.linalg.norm(u, axis=1)
    np.testing.assert_allclose(drawn(ax)["before smoothing"][1], norms, rtol=1e-5)


def test_before_and_after_are_told_apart_without_color():
    ax = plots.cosines_over_training(record_of([0, 1, 2]))
    before, after, _ = ax.lines
    assert before.get_linestyle() != after.get_linestyle()
    assert before.get_marker() != after.get_marker()
    styles = [str(band.get_linestyle()) for band in ax.collections]
    assert styles[0] != styles[1]
    assert len({to_hex(band.get_edgecolor()[0]) for band in ax.collections}) == 2
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["before smoothing", "after smoothing"]


OVER_TRAINING = [plots.roughness_over_training, plots.cosines_over_training]
OF_RECORDS = [*OVER_TRAINING, plots.layer_norms]


@pytest.mark.parametrize("draw", OVER_TRAINING)
def test_repeated_and_unrecorded_steps_are_drawn_once_and_not_at_all(draw):
    record = record_of([-1, -1, 0, 0, 4, 4])
    for form in (record, as_list(record), [record, as_list(record)[3]]):
        for x, _ in drawn(draw(form)).values():
            np.testing.assert_array_equal(x, [0, 4])


def test_of_a_step_that_was_run_again_from_a_checkpoint_the_last_is_drawn():
    first, again = record_of([0, 1, 2, 3]), record_of([2, 3, 4])
    ax = plots.roughness_over_training([first, again])
    wanted = [
        np.append(a.relative_roughness[:2], b.relative_roughness)
        for a, b in zip(parts_of(first), parts_of(again), strict=True)
    ]
    assert_drawn(ax, [0, 1, 2, 3, 4], *wanted)


def test_one_step_is_a_point_with_a_tick_of_its_number():
    ax = plots.cosines_over_training(record_of(7))
    ax.figure.draw_without_rendering()
    assert [x.tolist() for x, _ in drawn(ax).values()] == [[7], [7]]
    low, high = ax.get_xlim()
    assert [t for t in ax.get_xticks() if low <= t <= high] == [7]


def test_a_step_that_was_not_finite_leaves_a_hole_and_is_no_error():
    record = record_of([0, 1, 2, 3])
    record.before["blocks"].cosines[1, 2] = np.nan
    record.before["blocks"].relative_roughness[1] = np.nan
    for draw in OVER_TRAINING:
        ax = draw(record)
        ax.figure.draw_without_rendering()
        _, y = drawn(ax)["before smoothing"]
        np.testing.assert_array_equal(np.isnan(y), [False, True, False, False])


def test_names_that_are_no_strings_are_given_as_they_are():
    record = record_of(0, stacks=["('decoder', 0)"], roles=["('w', 1)"])
    ax = plots.layer_norms(record, stack=("decoder", 0), role=("w", 1))
    assert ax.get_title().endswith("('decoder', 0), ('w', 1)")


# What filters leave, and paired differences.


def test_the_picture_of_a_signal_has_the_block_and_every_role():
    ax = plots.depth_signal(signal())
    rows = [label.get_text() for label in ax.get_yticklabels()]
    assert rows == ["whole block", "a", "b"]
    (best, *_), roles = ax.containers, signal().roles["h"]
    shares = [of.left["best filter"] for of in (signal().blocks["h"], *roles.values())]
    ((x, _),) = best[0].get_xydata()
    assert x == shares[0].value
    assert best[2][0].get_segments()[0][:, 0] == pytest.approx(shares[0][1:])


def rows_of(ax):
    """{row: (mean, low, high, filled)} of the intervals; NaN where there is none."""
    rows = {}
    for container in ax.containers:
        point, _, bars = container
        ((x, y),) = point.get_xydata()
        low, high = bars[0].get_segments()[0][:, 0] if bars else (np.nan, np.nan)
        filled = to_hex(point.get_markerfacecolor()) != "#ffffff"
        rows[round(y)] = (x, low, high, filled)
    return rows


def seeds_of(ax, row):
    lines = [
        line
        for line in ax.lines
        if line.get_linestyle() == "None"
        and line.get_markerfacecolor() == "none"
        and len(line.get_ydata())
        and round(line.get_ydata()[0]) == row
    ]
    return np.concatenate([line.get_xdata() for line in lines]) if lines else []


@pytest.mark.parametrize("level", [0.95, 0.5])
def test_intervals_are_those_of_a_t_test_of_the_mean_and_filled_if_without_0(level):
    ax = plots.paired_differences(arms(), level=level)
    rows = rows_of(ax)
    assert list(rows) == [0, 1, 2]
    for row, values in enumerate(arms().values()):
        wanted = scipy.stats.ttest_1samp(values, 0).confidence_interval(level)
        mean, low, high, filled = rows[row]
        np.testing.assert_allclose(mean, np.mean(values))
        np.testing.assert_allclose([low, high], wanted)
        assert filled == (not wanted.low <= 0 <= wanted.high)
        np.testing.assert_array_equal(seeds_of(ax, row), values)
    assert ax.yaxis_inverted()  # the first on top
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert f"mean, {100 * level:g} % interval" in legend[1]


def test_an_interval_of_two_seeds_has_a_closed_form():
    # Student's t of one degree of freedom is Cauchy's: its 75 % quantile is 1.
    ax = plots.paired_differences({"a": jnp.array([1.0, 3.0])}, level=0.5)
    assert rows_of(ax)[0][:3] == pytest.approx((2.0, 1.0, 3.0))


def narrow(scale=1.0):
    """-0.0132 ± 0.0099 over three seeds, times a scale."""
    half = scipy.stats.t.ppf(0.975, 2)  # of -1, 0, 1: times 1 / √3
    return scale * (-0.0132 + 0.0099 * np.array([-1, 0, 1]) * np.sqrt(3) / half)


# What stands beside the rows: digits of the narrowest interval.
BESIDE = [
    (
        lambda: {"a": narrow(), "b": 0.5 + (narrow() + 0.0132) * (0.25 / 0.0099)},
        ["-0.0132 ± 0.0099 (3/3 below 0)", "+0.5000 ± 0.2500 (0/3 below 0)"],
    ),
    (lambda: {"a": narrow(1e5)}, ["-1320 ± 990 (3/3 below 0)"]),
    (lambda: {"a": narrow(1e-8)}, ["-1.32e-10 ± 9.9e-11 (3/3 below 0)"]),
    (
        lambda: {"a": np.full(3, 0.1), "b": np.zeros(2)},
        ["+0.100 ± 0.000 (0/3 below 0)", "+0.000 ± 0.000 (0/2 below 0)"],
    ),
    (lambda: {"a": [-0.0123]}, ["-0.0123 (1/1 below 0)"]),
    (
        lambda: {"fine": [0.1, 0.2], "some": [0.3, np.nan, np.inf], "all": [np.nan]},
        ["+0.15 ± 0.64 (0/2 below 0)", "2 of 3 diverged", "1 of 1 diverged"],
    ),
]


@pytest.mark.parametrize("row", range(len(BESIDE)))
def test_numbers_beside_have_the_digits_of_the_narrowest_interval(row):
    differences, texts = BESIDE[row]
    ax = plots.paired_differences(differences())
    assert [text.get_text() for text in ax.texts] == texts


def test_one_seed_has_no_interval_and_an_arm_that_diverged_no_mean():
    ax = plots.paired_differences({"a": [-0.0123]})
    mean, low, high, filled = rows_of(ax)[0]
    assert mean == -0.0123
    assert np.isnan([low, high]).all()
    assert not filled
    differences = {"fine": [0.1, 0.2], 0.2: [0.3, np.nan, np.inf], "all": [np.nan]}
    ax = plots.paired_differences(differences)
    assert list(rows_of(ax)) == [0]
    np.testing.assert_array_equal(seeds_of(ax, 1), [0.3])
    assert len(seeds_of(ax, 2)) == 0
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["fine", "0.2", "all"]
    ax.figure.draw_without_rendering()
    plots.paired_differences({"all": [np.nan]}).figure.draw_without_rendering()


def test_there_is_a_line_at_zero_that_is_always_in_sight():
    ax = plots.paired_differences({"a": [1200.0, 1300.0]})
    (zero,) = [x for x in ax.lines if list(x.get_xdata()) == [0, 0]]
    assert zero.get_visible()
    assert ax.get_xlim()[0] <= 0


# Errors.


def told(call, *fragments):
    """It is an error that says this, and leaves no empty figure behind."""
    with pytest.raises((TypeError, ValueError)) as info:
        call()
    for fragment in fragments:
        assert fragment in str(info.value)
    assert plt.get_fignums() == []


def scheduled():
    return gs.repeat(gs.window(optax.linear_schedule(0.0, 0.2, 10)), 2)


def test_an_operator_that_cannot_be_drawn_is_told():
    draw, window = plots.operator_matrix, gs.window(0.2)
    told(lambda: draw(gs.similarity_window(0.2), 3), "`plots.operator_matrix` needs an")
    to_write = "`plots.operator_matrix(operator.at(step), 12)`"
    told(lambda: draw(scheduled(), 12), "gs.window(", "is a schedule", to_write)
    for number in (0, 2.5, "12"):
        told(lambda number=number: draw(window, number), "`num_layers` must be an int")
    for ax in (Figure(), np.array([None]), "left"):
        found = f"`ax` must be a matplotlib Axes, but is of type {type(ax).__name__}."
        to_write = "`plots.operator_matrix(..., ax=ax)`"
        told(lambda ax=ax: draw(window, 3, ax=ax), found, to_write)


def test_updates_of_no_or_of_several_stacks_are_told():
    two = {"a": updates_of(12), "b": updates_of(12)}
    draw, names = plots.cosine_matrix, "'a/blocks', 'b/blocks'"
    to_write = "`plots.cosine_matrix(updates, depth, stack='a/blocks')`"
    told(lambda: draw(two, SCANNED), "several stacks", names, to_write)
    told(lambda: draw(two, SCANNED, stack="c"), "`stack` is 'c'", names)
    title = draw(two, SCANNED, stack="b/blocks").get_title()
    assert title.endswith("b/blocks")
    plt.close("all")
    one, other = updates_of(12), gs.scanned("layers/")
    told(lambda: draw(one, other), "matched none of the 1 leaves")
    to_write = "print(describe(depth, updates))"
    told(lambda: draw(one, other, strict=False), to_write)


@pytest.mark.parametrize("draw", OF_RECORDS)
def test_what_is_no_record_or_not_in_it_is_told_with_what_to_write(draw):
    argument = "record" if draw is plots.layer_norms else "records"
    call = f"`plots.{draw.__name__}("
    for found in (
        (optax.EmptyState(), optax.EmptyState()),
        optax.ScaleByAdamState(0, {}, {}),
        {"blocks": 1},
        np.zeros(3),
        DepthRecord(np.zeros(()), np.zeros(()), np.zeros(())),
    ):
        fragments = "DepthRecord`", ", but there is a ", f"{call}gs.diagnostics.monit"
        told(lambda found=found: draw(found), *fragments)
    told(lambda: draw(record_of(-1)), "`step` is -1", "after an update")
    told(lambda: draw(DepthRecord(np.int32(0), {}, {})), "no stacks in this record")

    several, names = record_of(0, stacks=["encoder", "decoder"]), "'encoder', 'decoder'"
    to_write = f"{call}{argument}, stack='encoder')`"
    told(lambda: draw(several), "several stacks", names, to_write)
    told(lambda: draw(several, stack="x"), "`stack` is 'x'", names)
    to_write = f"{call}{argument}, stack='decoder', role='w')`"
    no_role = functools.partial(draw, several, stack="decoder", role="v")
    told(no_role, "`role` is 'v'", "'w', 'mlp/kernel'", to_write)
    assert "decoder" in draw(several, stack="decoder").get_title()


def test_records_of_no_step_of_many_or_of_many_seeds_are_told():
    for draw in OVER_TRAINING:
        for nothing in ([], record_of([-1, -1])):
            told(lambda draw=draw, x=nothing: draw(x), "nothing is recorded in `record")
        of_seeds = record_of(np.zeros((3, 2)))
        told(lambda draw=draw, x=of_seeds: draw(x), "shape (3, 2)", "x[0]")
    record = record_of([0, 1])
    to_write = "`plots.layer_norms(jax.tree.map(lambda x: x[-1], record))`"
    told(lambda: plots.layer_norms(record), "`step` has shape (2,)", to_write)
    as_written = "layer_norms(records[-1]"
    told(lambda: plots.layer_norms(as_list(record)), "sequence of 2", as_written)
    wrong = functools.partial(plots.roughness_over_training, record, relative="w")
    told(wrong, "`relative` must be True or False")


@pytest.mark.parametrize("kind", ["one layer", "no layers", "a gap"])
def test_layers_without_neighbors_are_not_said_to_be_unmatched(kind):
    depth = gs.unrolled(r"layers_(\d+)/") if kind == "a gap" else SCANNED
    tree = {
        "one layer": {"blocks": {"w": jnp.ones((1, 3))}},
        "no layers": {"blocks": {"w": jnp.ones((0, 3))}},
        "a gap": {f"layers_{i}": {"w": jnp.ones(3)} for i in (0, 2)},
    }[kind]
    tx = diagnostics.monitor_depth(optax.identity(), depth, strict=False)
    record = diagnostics.monitored(tx.update(tree, tx.init(tree))[1])
    for draw in OF_RECORDS:
        told(lambda draw=draw: draw(record), "that have a neighbor")
    told(lambda: plots.cosine_matrix(tree, depth, strict=False), "have a neighbor")


def test_differences_of_another_form_and_a_level_in_percent_are_told():
    draw = plots.paired_differences
    for differences, *fragments in (
        ([0.1, 0.2], "is of type list. Write `plots.paired_differences"),
        ({}, "`differences` has no arms"),
        ({"a": []}, "`differences['a']`", "but is empty"),
        ({"a": 0.1}, "number for each seed", "has shape ()"),
        ({"a": np.ones((2, 3))}, "has shape (2, 3)", "metrics[:, -1]"),
        ({"a": ["x"]}, "`differences['a']` must be an array of numbers"),
    ):
        told(lambda differences=differences: draw(differences), *fragments)
    told(lambda: draw(arms(), level=95), "between 0 and 1, but is 95. Write 0.95 f")
    told(lambda: draw(arms(), level=1.0), "between 0 and 1, but is 1.0")
    told(lambda: draw(arms(), level="95 %"), "`level` must be a number between 0 and 1")
