"""`gradsmooth_optax.plots`: what is drawn, where, how it looks, and the errors."""

import os
import re
import subprocess
import sys

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
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def role_statistics(time, num_layers):
    return RoleStatistics(
        norms=RNG.uniform(1, 2, (*time, num_layers)),
        cosines=RNG.uniform(-0.5, 1, (*time, num_layers - 1)),
        roughness=RNG.uniform(5, 6, time),
        relative_roughness=RNG.uniform(0.5, 1.5, time),
    )


def depth_statistics(time, num_layers, roles):
    of_roles = {role: role_statistics(time, num_layers) for role in roles}
    return DepthStatistics(*role_statistics(time, num_layers), roles=of_roles)


def random_record(steps, num_layers=6, stacks=("blocks",), roles=("w", "mlp/kernel")):
    """A record; with a time axis for several steps."""
    of_stacks = (
        {s: depth_statistics(np.shape(steps), num_layers, roles) for s in stacks}
        for _ in range(2)
    )
    return DepthRecord(np.asarray(steps, np.int32), *of_stacks)


def as_list(record):
    """One record for each step."""
    return [jax.tree.map(lambda x, t=t: x[t], record) for t in range(len(record.step))]


def correlated_updates(num_layers, width=32, sign_changes=False):
    """Each layer's update correlated with its neighbors'."""
    steps = RNG.normal(size=(num_layers, width))
    u = np.cumsum(steps, axis=0)
    if sign_changes:
        u[: num_layers // 2] *= -1
    return {"blocks": {"w": u.astype(np.float32)}}


ARMS = {
    "window(0.2)": RNG.normal(-0.013, 0.02, 16),
    "norm-preserving window(0.2), with norms of whole blocks": RNG.normal(0, 0.02, 16),
    "mean over depth": RNG.normal(0.03, 0.02, 16),
}

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
    "cosine_matrix": lambda **kw: plots.cosine_matrix(
        correlated_updates(12, sign_changes=True), SCANNED, **kw
    ),
    "cosine_matrix of 200": lambda **kw: plots.cosine_matrix(
        correlated_updates(200, sign_changes=True), SCANNED, **kw
    ),
    "roughness_over_training": lambda **kw: plots.roughness_over_training(
        random_record(range(0, 200_000, 500)), role="mlp/kernel", **kw
    ),
    "cosines_over_training": lambda **kw: plots.cosines_over_training(
        random_record(range(100), stacks=["params/decoder/layers"]), **kw
    ),
    "layer_norms": lambda **kw: plots.layer_norms(random_record(3), **kw),
    "layer_norms of 200": lambda **kw: plots.layer_norms(random_record(3, 200), **kw),
    "paired_differences": lambda **kw: plots.paired_differences(ARMS, **kw),
}
all_pictures = pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)


@pytest.fixture(scope="module", params=DRAW.values(), ids=DRAW)
def picture(request):
    """The Axes of a new figure, laid out; for tests that only look at it."""
    ax = request.param()
    ax.figure.draw_without_rendering()
    return ax


# Every function.


@all_pictures
def test_a_new_figure_is_one_of_pyplot_so_that_a_notebook_shows_it(draw):
    ax = draw()
    assert plt.get_fignums() == [ax.figure.number]
    assert plt.gca() is ax


@all_pictures
def test_it_draws_into_the_axes_that_it_is_given_and_makes_no_figure(draw):
    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    assert draw(ax=right) is right
    assert right.has_data()
    assert not left.has_data()
    assert not left.texts
    assert not left.get_title()
    assert plt.get_fignums() == []
    # At most a color bar is added.
    added = [ax for ax in figure.axes if ax not in (left, right)]
    assert len(added) == bool(right.images)


@all_pictures
def test_global_settings_of_matplotlib_stay_as_they_are(draw):
    before = dict(matplotlib.rcParams)
    draw()
    assert dict(matplotlib.rcParams) == before


def test_nothing_is_cut_off_and_titles_and_legends_cover_nothing(picture):
    ax, figure = picture, picture.figure
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= width
    assert box.y1 <= height
    title, data = ax.title.get_window_extent(), ax.get_window_extent()
    assert title.y0 >= data.y1
    if ax.get_legend() is not None:
        legend = ax.get_legend().get_window_extent()
        assert data.y1 <= legend.y0
        assert legend.y1 <= title.y0 + 3  # of a frame that is not drawn


def test_axes_have_labels_a_title_and_few_ticks_whose_texts_do_not_overlap(picture):
    ax = picture
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


def test_without_matplotlib_every_function_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name, draw in DRAW.items():
        with pytest.raises(ImportError) as info:
            draw()
        message = str(info.value)
        assert f"`plots.{name.split(' of ')[0]}` needs matplotlib" in message
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
        ax = plots.operator_matrix(window(0.2), 3)
        ax.figure.savefig(sys.stdout.buffer)
    """
    displays = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    env = {k: v for k, v in os.environ.items() if k not in displays}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "ax", [Figure(), np.array([None]), "left"], ids=["figure", "array", "text"]
)
def test_an_ax_that_is_none_is_an_error_that_shows_how_to_make_one(ax):
    found = rf"`ax` must be a matplotlib Axes, but is of type {type(ax).__name__}\."
    with pytest.raises(TypeError, match=found) as info:
        plots.operator_matrix(gs.window(0.2), 3, ax=ax)
    assert "`plots.operator_matrix(..., ax=ax)`" in str(info.value)


# Heat maps.


def window_matrix(alpha, num_layers):
    s = (1 - alpha) * np.eye(num_layers)
    for a, b in ((0, 1), (1, 0)):
        n = num_layers - 1
        s[np.arange(n) + a, np.arange(n) + b] = alpha / 2
    s[0, 0] = s[-1, -1] = 1 - alpha / 2
    return s


@pytest.mark.parametrize("num_layers", [2, 12, 13, 200])
def test_the_picture_of_an_operator_is_its_matrix_row_by_row(num_layers):
    ax = plots.operator_matrix(gs.window(0.2), num_layers)
    (image,) = ax.images
    np.testing.assert_allclose(image.get_array(), window_matrix(0.2, num_layers))
    assert image.origin == "upper"
    assert ax.get_ylabel() == "layer that receives"
    assert ax.get_xlabel() == "from layer"


def test_rows_are_what_receives_also_where_a_matrix_is_not_symmetric():
    first = gs.operator_fn(lambda n: np.eye(n)[[0] * n])
    ax = plots.operator_matrix(first, 3)
    np.testing.assert_array_equal(
        ax.images[0].get_array(), [[1, 0, 0], [1, 0, 0], [1, 0, 0]]
    )


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


def test_a_weight_beyond_1_widens_the_scale():
    ax = plots.operator_matrix(gs.dense(np.diag([4.0, 1.0, 1.0])), 3)
    assert ax.images[0].get_clim() == (-4, 4)


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
    for text in ax.texts:
        column, row = text.get_position()
        *rgb, _ = image.cmap(image.norm(image.get_array()[row, column]))
        gray = np.dot(rgb, [0.299, 0.587, 0.114])
        assert (text.get_color() == "white") == (gray < 0.5)
        assert text.get_window_extent().width < cell


def test_many_layers_or_little_room_have_no_numbers():
    assert not plots.operator_matrix(gs.window(0.2), 13).texts
    small = Figure(figsize=(2, 2)).subplots()
    assert not plots.operator_matrix(gs.window(0.2), 12, ax=small).texts


def hatched_cells(ax):
    (patch,) = [p for p in ax.patches if isinstance(p, PathPatch)]
    assert patch.get_hatch()
    corners = patch.get_path().vertices.reshape(-1, 5, 2)
    return {tuple(center) for center in corners[:, [0, 2]].mean(1)[:, ::-1]}


def test_in_print_negative_cells_are_told_from_positive_ones_by_hatches():
    updates = correlated_updates(200, sign_changes=True)
    ax = plots.cosine_matrix(updates, SCANNED)
    u = updates["blocks"]["w"].astype(np.float64)
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    cosines = u @ u.T
    certain = np.abs(cosines + 0.1) > 1e-5
    wanted = {tuple(at) for at in np.argwhere(certain & (cosines < -0.1))}
    assert wanted == hatched_cells(ax) - {tuple(at) for at in np.argwhere(~certain)}
    assert ax.figure.axes[1].patches  # and on the color bar


def test_without_negative_cells_nothing_is_hatched():
    assert not plots.operator_matrix(gs.window(0.2), 24).patches


def test_an_operator_of_zeros_and_one_of_one_layer_are_drawn():
    ax = plots.operator_matrix(gs.dense(np.zeros((3, 3))), 3)
    np.testing.assert_array_equal(ax.images[0].get_array(), np.zeros((3, 3)))
    ax = plots.operator_matrix(gs.ema(0.5), 1)
    np.testing.assert_array_equal(ax.images[0].get_array(), [[1.0]])


@pytest.mark.parametrize(
    ("operator", "title"),
    [
        (gs.window(0.2), "window(0.2), L = 3"),
        (gs.window(jnp.float32(0.25), radius=2), "window(0.25, radius=2), L = 3"),
        (gs.dense(np.eye(2)), "dense([[1.0, 0.0], [0.0, 1.0]]), L = 2"),
        (gs.operator_fn(np.eye), "operator_fn(<numpy.eye>), L = 3"),
        (
            gs.compose(gs.ema(0.5), gs.mean_over_depth()),
            "compose(ema(0.5), mean_over_depth()), L = 3",
        ),
    ],
    ids=["a number", "an array", "a matrix", "a function", "composed"],
)
def test_the_title_names_the_operator_and_the_number_of_layers(operator, title):
    num_layers = int(title[-1])
    assert plots.operator_matrix(operator, num_layers).get_title() == title


def test_a_long_name_takes_two_lines_and_keeps_the_number_of_layers():
    operator = gs.compose(*[gs.window(0.1 * i) for i in range(1, 9)])
    title = plots.operator_matrix(operator, 24).get_title()
    assert re.fullmatch(r"compose\(.{20,40}\n.{20,46} …, L = 24", title)


def test_operators_without_a_matrix_are_the_error_of_all_that_need_one():
    with pytest.raises(TypeError, match=r"`plots\.operator_matrix` needs an operator"):
        plots.operator_matrix(gs.similarity_window(0.2), 3)


def test_a_schedule_is_an_error_that_shows_how_to_resolve_it():
    scheduled = gs.repeat(gs.window(optax.linear_schedule(0.0, 0.2, 10)), 2)
    with pytest.raises(TypeError, match=r"gs\.window\(.*is a schedule") as info:
        plots.operator_matrix(scheduled, 12)
    assert "`plots.operator_matrix(operator.at(step), 12)`" in str(info.value)
    ax = plots.operator_matrix(scheduled.at(10), 12)
    s = window_matrix(0.2, 12)
    np.testing.assert_allclose(ax.images[0].get_array(), s @ s, atol=1e-6)


@pytest.mark.parametrize("num_layers", [0, 2.5, "12"])
def test_a_number_of_layers_that_is_none_is_an_error(num_layers):
    with pytest.raises((TypeError, ValueError), match="`num_layers` must be an int"):
        plots.operator_matrix(gs.window(0.2), num_layers)


@pytest.mark.parametrize("num_layers", [12, 200])
def test_cosines_of_all_pairs_of_layers_are_on_a_fixed_scale(num_layers):
    updates = correlated_updates(num_layers)
    ax = plots.cosine_matrix(updates, SCANNED)
    u = updates["blocks"]["w"].astype(np.float64)
    wanted = [
        [np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y) for y in u] for x in u
    ]
    np.testing.assert_allclose(ax.images[0].get_array(), wanted, atol=1e-5)
    assert ax.images[0].get_clim() == (-1, 1)
    assert ax.figure.axes[1].get_ylim() == (-1, 1)
    assert ax.get_title() == "cosines of updates: blocks"


def test_cosines_are_written_with_two_digits_and_zeros_as_well(monkeypatch):
    cosines = np.array([[1.0, -0.6, 0.0], [-0.6, 1.0, 0.125], [-0.004, -0.999, np.nan]])
    found = {"blocks": jnp.asarray(cosines)}
    monkeypatch.setattr(diagnostics, "cosine_matrix", lambda *_, **__: found)
    ax = plots.cosine_matrix(correlated_updates(3), SCANNED)
    written = [text.get_text() for text in ax.texts]
    assert written == ["1", "-.6", "0", "-.6", "1", ".12", "0", "-1", "nan"]


def test_of_several_stacks_one_is_chosen_by_name():
    stacks = {"a": correlated_updates(12), "b": correlated_updates(200)}
    with pytest.raises(ValueError, match=r"several stacks.*'a/blocks', 'b/blo") as info:
        plots.cosine_matrix(stacks, SCANNED)
    call = "`plots.cosine_matrix(updates, depth, stack='a/blocks')`"
    assert call in str(info.value)
    ax = plots.cosine_matrix(stacks, SCANNED, stack="b/blocks")
    assert ax.images[0].get_array().shape == (200, 200)
    with pytest.raises(ValueError, match=r"`stack` is 'c'.*'a/blocks', 'b/blocks'"):
        plots.cosine_matrix(stacks, SCANNED, stack="c")


def test_nothing_matched_is_an_error_also_where_strict_permits_it():
    updates = correlated_updates(3)
    with pytest.raises(ValueError, match="matched none of the 1 leaves"):
        plots.cosine_matrix(updates, gs.scanned("layers/"))
    with pytest.raises(ValueError, match=r"print\(describe\(depth, updates\)\)"):
        plots.cosine_matrix(updates, gs.scanned("layers/"), strict=False)


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


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("role", [None, "w"])
@pytest.mark.parametrize("form", [lambda r: r, as_list], ids=["stacked", "list"])
def test_roughness_is_drawn_against_the_step(form, role, relative):
    record = random_record([0, 10, 20, 30])
    ax = plots.roughness_over_training(form(record), role=role, relative=relative)
    field = "relative_roughness" if relative else "roughness"
    parts = [x["blocks"] for x in (record.before, record.after)]
    if role:
        parts = [part.roles[role] for part in parts]
    assert_drawn(ax, [0, 10, 20, 30], *(getattr(part, field) for part in parts))
    assert ax.get_ylim()[0] == 0
    what = field.replace("_", " ")
    assert ax.get_title() == f"{what} of updates: blocks{', w' if role else ''}"


def test_what_a_scan_of_a_monitored_optimizer_gives_can_be_drawn_as_it_is():
    updates = correlated_updates(4, width=3)
    smooth = gs.smooth_over_depth(SCANNED, 0.5)
    tx = optax.chain(
        diagnostics.monitor_depth(smooth, SCANNED, every=2), optax.scale(-1.0)
    )

    def step(state, factor):
        _, state = tx.update(jax.tree.map(lambda u: factor * u, updates), state)
        return state, diagnostics.monitored(state)

    factors = jnp.arange(1.0, 7.0)
    state, records = jax.lax.scan(step, tx.init(updates), factors)
    ax = plots.roughness_over_training(records, relative=False)
    u = updates["blocks"]["w"].astype(np.float64)
    of = [np.sum(np.diff(x, axis=0) ** 2) for x in (u, window_matrix(0.5, 4) @ u)]
    for (x, y), roughness in zip(drawn(ax).values(), of, strict=True):
        np.testing.assert_array_equal(x, [0, 2, 4])  # each once
        np.testing.assert_allclose(y, roughness * np.array([1, 9, 25]), rtol=1e-5)

    ax = plots.layer_norms(diagnostics.monitored(state))
    norms = 5 * np.linalg.norm(u, axis=1)
    np.testing.assert_allclose(drawn(ax)["before smoothing"][1], norms, rtol=1e-5)


@pytest.mark.parametrize("role", [None, "mlp/kernel"])
@pytest.mark.parametrize("form", [lambda r: r, as_list], ids=["stacked", "list"])
def test_cosines_are_drawn_as_mean_and_range_over_pairs(form, role):
    record = random_record([0, 10, 20])
    ax = plots.cosines_over_training(form(record), role=role)
    parts = [x["blocks"] for x in (record.before, record.after)]
    cosines = [(p.roles[role] if role else p).cosines for p in parts]
    assert_drawn(ax, [0, 10, 20], *(c.mean(1) for c in cosines))
    assert len(ax.collections) == 2
    for band, of in zip(ax.collections, cosines, strict=True):
        corners = {tuple(v) for v in band.get_paths()[0].vertices.tolist()}
        edges = zip([0, 10, 20] * 2, [*of.min(1), *of.max(1)], strict=True)
        assert corners == set(edges)


def test_before_and_after_are_told_apart_without_color():
    ax = plots.cosines_over_training(random_record([0, 1, 2]))
    before, after, _ = ax.lines
    assert before.get_linestyle() != after.get_linestyle()
    assert before.get_marker() != after.get_marker()
    styles = [str(band.get_linestyle()) for band in ax.collections]
    assert styles[0] != styles[1]
    assert len({to_hex(band.get_edgecolor()[0]) for band in ax.collections}) == 2
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["before smoothing", "after smoothing"]


@pytest.mark.parametrize(
    "draw", [plots.roughness_over_training, plots.cosines_over_training]
)
def test_repeated_and_unrecorded_steps_are_drawn_once_and_not_at_all(draw):
    record = random_record([-1, -1, 0, 0, 4, 4])
    for form in (record, as_list(record), [record, as_list(record)[3]]):
        for x, _ in drawn(draw(form)).values():
            np.testing.assert_array_equal(x, [0, 4])


def test_of_a_step_that_was_run_again_from_a_checkpoint_the_last_is_drawn():
    first, again = random_record([0, 1, 2, 3]), random_record([2, 3, 4])
    ax = plots.roughness_over_training([first, again])
    wanted = [
        np.append(a["blocks"].relative_roughness[:2], b["blocks"].relative_roughness)
        for a, b in ((first.before, again.before), (first.after, again.after))
    ]
    assert_drawn(ax, [0, 1, 2, 3, 4], *wanted)


def test_one_step_is_a_point_with_a_tick_of_its_number():
    ax = plots.cosines_over_training(random_record(7))
    ax.figure.draw_without_rendering()
    assert [x.tolist() for x, _ in drawn(ax).values()] == [[7], [7]]
    low, high = ax.get_xlim()
    assert [t for t in ax.get_xticks() if low <= t <= high] == [7]


def test_a_step_that_was_not_finite_leaves_a_hole_and_is_no_error():
    record = random_record([0, 1, 2, 3])
    record.before["blocks"].cosines[1, 2] = np.nan
    record.before["blocks"].relative_roughness[1] = np.nan
    for draw in (plots.roughness_over_training, plots.cosines_over_training):
        ax = draw(record)
        ax.figure.draw_without_rendering()
        _, y = drawn(ax)["before smoothing"]
        np.testing.assert_array_equal(np.isnan(y), [False, True, False, False])


@pytest.mark.parametrize("num_layers", [2, 200])
@pytest.mark.parametrize("role", [None, "w"])
def test_norms_are_drawn_against_the_layer(num_layers, role):
    record = random_record(30, num_layers)
    ax = plots.layer_norms(record, role=role)
    parts = [x["blocks"] for x in (record.before, record.after)]
    norms = [(p.roles[role] if role else p).norms for p in parts]
    assert_drawn(ax, np.arange(num_layers), *norms)
    assert ax.get_ylim()[0] == 0
    assert "at step 30: blocks" in ax.get_title()


# Errors of what was recorded.

OVER_TRAINING = [plots.roughness_over_training, plots.cosines_over_training]
OF_RECORDS = [*OVER_TRAINING, plots.layer_norms]


@pytest.mark.parametrize("draw", OF_RECORDS)
@pytest.mark.parametrize(
    "found",
    [
        (optax.EmptyState(), optax.EmptyState()),
        optax.ScaleByAdamState(0, {}, {}),
        {"blocks": 1},
        np.zeros(3),
        DepthRecord(jnp.zeros(()), jnp.zeros(()), jnp.zeros(())),
    ],
    ids=lambda found: type(found).__name__,
)
def test_no_record_is_an_error_that_shows_where_to_take_one_from(draw, found):
    with pytest.raises(TypeError, match=r"DepthRecord`.*, but there is a ") as info:
        draw(found)
    call = f"`plots.{draw.__name__}(gs.diagnostics.monitored(opt_state))`"
    assert call in str(info.value)


@pytest.mark.parametrize("draw", OF_RECORDS)
def test_nothing_recorded_is_an_error_that_says_what_to_do(draw):
    with pytest.raises(ValueError, match=r"`step` is -1.*after an update"):
        draw(random_record(-1))


@pytest.mark.parametrize("draw", OVER_TRAINING)
@pytest.mark.parametrize("records", [[], random_record([-1, -1])], ids=["none", "-1"])
def test_no_record_of_a_whole_training_is_an_error_as_well(draw, records):
    with pytest.raises(ValueError, match="nothing is recorded in `records`"):
        draw(records)


@pytest.mark.parametrize("draw", OF_RECORDS)
def test_a_stack_has_to_be_one_of_those_there(draw):
    argument = "record" if draw is plots.layer_norms else "records"
    several = random_record(0, stacks=["encoder", "decoder"])
    with pytest.raises(ValueError, match=r"several stacks.*'encoder', 'dec") as info:
        draw(several)
    call = f"`plots.{draw.__name__}({argument}, stack='encoder')`"
    assert call in str(info.value)
    with pytest.raises(ValueError, match=r"`stack` is 'x'.*'encoder', 'decoder'"):
        draw(several, stack="x")
    assert "decoder" in draw(several, stack="decoder").get_title()
    with pytest.raises(ValueError, match="no stacks in this record"):
        draw(DepthRecord(np.int32(0), {}, {}))


def lone_layers():
    """Trees in which `depth` matches layers, none of which has a neighbor."""
    one, none = {"w": jnp.ones((1, 3))}, {"w": jnp.ones((0, 3))}
    apart = {f"layers_{i}": {"w": jnp.ones(3)} for i in (0, 2)}
    return {
        "one layer": (gs.scanned("blocks/"), {"blocks": one}),
        "no layers": (gs.scanned("blocks/"), {"blocks": none}),
        "two stacks": (gs.scanned("(?:a|b)locks/"), {"alocks": one, "blocks": none}),
        "a gap": (gs.unrolled(r"layers_(\d+)/"), apart),
    }


@pytest.mark.parametrize("name", lone_layers())
def test_layers_without_neighbors_are_not_said_to_be_unmatched(name):
    depth, tree = lone_layers()[name]
    tx = gs.diagnostics.monitor_depth(optax.identity(), depth, strict=False)
    record = gs.diagnostics.monitored(tx.update(tree, tx.init(tree))[1])
    draws = [lambda draw=draw: draw(record) for draw in OF_RECORDS]
    draws.append(lambda: plots.cosine_matrix(tree, depth, strict=False))
    for draw in draws:
        with pytest.raises(ValueError, match=r"no layers .*that have a neighbor"):
            draw()


@pytest.mark.parametrize("draw", OF_RECORDS)
def test_a_role_has_to_be_one_of_those_there(draw):
    argument = "record" if draw is plots.layer_norms else "records"
    with pytest.raises(ValueError, match=r"`role` is 'v'.*'w', 'mlp/kernel'") as info:
        draw(random_record(0, stacks=["a", "b"]), stack="b", role="v")
    call = f"`plots.{draw.__name__}({argument}, stack='b', role='w')`"
    assert call in str(info.value)


def test_names_that_are_no_strings_are_given_as_they_are():
    record = random_record(0, stacks=["('decoder', 0)"], roles=["('w', 1)"])
    ax = plots.layer_norms(record, stack=("decoder", 0), role=("w", 1))
    assert ax.get_title().endswith("('decoder', 0), ('w', 1)")


def test_norms_of_many_steps_are_an_error_that_shows_how_to_take_one():
    record = random_record([0, 1])
    with pytest.raises(ValueError, match=r"`step` has shape \(2,\)") as info:
        plots.layer_norms(record)
    call = "`plots.layer_norms(jax.tree.map(lambda x: x[-1], record))`"
    assert call in str(info.value)
    plots.layer_norms(jax.tree.map(lambda x: x[-1], record))
    with pytest.raises(ValueError, match=r"sequence of 2.*layer_norms\(records\[-1\]"):
        plots.layer_norms(as_list(record))


@pytest.mark.parametrize("draw", OVER_TRAINING)
def test_an_axis_over_seeds_is_an_error_that_shows_how_to_take_one(draw):
    with pytest.raises(ValueError, match=r"shape \(3, 2\).*x\[0\]"):
        draw(random_record(np.zeros((3, 2))))


def test_relative_is_true_or_false():
    with pytest.raises(TypeError, match="`relative` must be True or False"):
        plots.roughness_over_training(random_record([0]), relative="w")


# Paired differences.


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
    ax = plots.paired_differences(ARMS, level=level)
    rows = rows_of(ax)
    assert list(rows) == [0, 1, 2]
    for row, values in enumerate(ARMS.values()):
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
    ax = plots.paired_differences({"a": [1.0, 3.0]}, level=0.5)
    assert rows_of(ax)[0][:3] == pytest.approx((2.0, 1.0, 3.0))


def texts_beside(ax):
    return [text.get_text() for text in ax.texts]


def test_numbers_beside_have_the_digits_of_the_narrowest_interval():
    half = scipy.stats.t.ppf(0.975, 2)  # of -1, 0, 1: times 1 / √3
    at = np.array([-1, 0, 1]) * np.sqrt(3) / half
    arms = {"a": -0.0132 + 0.0099 * at, "b": 0.5 + 0.25 * at}
    ax = plots.paired_differences(arms)
    assert texts_beside(ax) == [
        "-0.0132 ± 0.0099 (3/3 below 0)",
        "+0.5000 ± 0.2500 (0/3 below 0)",
    ]
    ax = plots.paired_differences({"a": 1e5 * arms["a"]})
    assert texts_beside(ax) == ["-1320 ± 990 (3/3 below 0)"]
    ax = plots.paired_differences({"a": 1e-8 * arms["a"]})
    assert texts_beside(ax) == ["-1.32e-10 ± 9.9e-11 (3/3 below 0)"]


def test_seeds_without_any_spread_are_drawn():
    ax = plots.paired_differences({"a": np.full(3, 0.1), "b": np.zeros(2)})
    assert texts_beside(ax) == [
        "+0.100 ± 0.000 (0/3 below 0)",
        "+0.000 ± 0.000 (0/2 below 0)",
    ]


def test_one_seed_has_no_interval():
    ax = plots.paired_differences({"a": [-0.0123]})
    mean, low, high, filled = rows_of(ax)[0]
    assert mean == -0.0123
    assert np.isnan([low, high]).all()
    assert not filled
    assert texts_beside(ax) == ["-0.0123 (1/1 below 0)"]


def test_an_arm_that_diverged_shows_the_seeds_that_did_not_and_no_mean():
    arms = {"fine": [0.1, 0.2], "some": [0.3, np.nan, np.inf], "all": [np.nan]}
    ax = plots.paired_differences(arms)
    assert list(rows_of(ax)) == [0]
    assert texts_beside(ax)[1:] == ["2 of 3 diverged", "1 of 1 diverged"]
    np.testing.assert_array_equal(seeds_of(ax, 1), [0.3])
    assert len(seeds_of(ax, 2)) == 0
    ax.figure.draw_without_rendering()
    plots.paired_differences({"all": [np.nan]}).figure.draw_without_rendering()


def test_there_is_a_line_at_zero_that_is_always_in_sight():
    ax = plots.paired_differences({"a": [1200.0, 1300.0]})
    (zero,) = [x for x in ax.lines if list(x.get_xdata()) == [0, 0]]
    assert zero.get_visible()
    assert ax.get_xlim()[0] <= 0


def test_differences_may_be_jax_arrays_and_their_names_anything():
    ax = plots.paired_differences({0.2: jnp.array([1.0, 2.0])})
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["0.2"]


@pytest.mark.parametrize(
    ("differences", "error", "message"),
    [
        ([0.1, 0.2], TypeError, r"is of type list\. Write `plots\.paired_differences"),
        ({}, ValueError, "`differences` has no arms"),
        ({"a": []}, ValueError, r"`differences\['a'\]` .*but is empty"),
        ({"a": 0.1}, ValueError, r"number for each seed.*has shape \(\)"),
        ({"a": np.ones((2, 3))}, ValueError, r"has shape \(2, 3\).*metrics\[:, -1\]"),
        ({"a": ["x"]}, TypeError, r"`differences\['a'\]` must be an array of numbers"),
    ],
)
def test_differences_of_another_form_are_an_error(differences, error, message):
    with pytest.raises(error, match=message):
        plots.paired_differences(differences)


def test_a_level_that_is_a_percentage_is_an_error_with_the_fraction():
    with pytest.raises(ValueError, match=r"between 0 and 1, but is 95\. Write 0\.95 f"):
        plots.paired_differences(ARMS, level=95)
    with pytest.raises(TypeError, match="`level` must be a number between 0 and 1"):
        plots.paired_differences(ARMS, level="95 %")


def test_an_error_leaves_no_empty_figure_behind():
    with pytest.raises(ValueError, match="no arms"):
        plots.paired_differences({})
    with pytest.raises(TypeError, match="DepthRecord"):
        plots.layer_norms(None)
    assert plt.get_fignums() == []
