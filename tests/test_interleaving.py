import jax
import numpy as np
import pytest

from benchmarks import checkpoints
from benchmarks.interleaving import Plan, new_run, train_in_turns
from benchmarks.json_files import write_json
from benchmarks.pretrain import train
from benchmarks.pretrain_figures import learning_curves
from benchmarks.pretrain_report import arm_results, results_table, thinned
from benchmarks.training import TrainState

PLAN = Plan(steps=11, chunk=3, eval_every=5)
SEEDS = 2


def initial_run(plan=PLAN):
    """Arms `a` and `b`, whose one parameter counts the steps from 0 and from 100."""
    states = {
        name: TrainState(params=jax.numpy.full(SEEDS, start), opt_state=())
        for name, start in (("a", 0.0), ("b", 100.0))
    }
    return new_run(states, plan, SEEDS)


def counting_trainers(calls):
    """Trainers that add 1 per step and whose loss is the step's number."""

    def trainer(name):
        def count(state, start, num_steps):
            calls.append((name, start, num_steps))
            losses = np.arange(start, start + num_steps)[:, None] * np.ones(SEEDS)
            return state._replace(params=state.params + num_steps), losses

        return count

    return {name: trainer(name) for name in ("a", "b")}


def evaluate(params):
    return 2 * params


def test_arms_take_turns_in_an_order_that_rotates():
    calls = []
    runs = list(train_in_turns(initial_run(), PLAN, counting_trainers(calls), evaluate))
    assert [run.step for run in runs] == PLAN.rounds == [3, 5, 6, 9, 10, 11]
    assert calls == [
        *[("a", 0, 3), ("b", 0, 3)],
        *[("b", 3, 2), ("a", 3, 2)],
        *[("a", 5, 1), ("b", 5, 1)],
        *[("b", 6, 3), ("a", 6, 3)],
        *[("a", 9, 1), ("b", 9, 1)],
        *[("b", 10, 1), ("a", 10, 1)],
    ]


def test_the_curves_say_what_every_arm_did_at_every_step():
    (*_, run) = train_in_turns(initial_run(), PLAN, counting_trainers([]), evaluate)
    steps = np.broadcast_to(np.arange(11)[:, None], (2, 11, SEEDS))
    np.testing.assert_array_equal(run.curves.train_loss, steps)
    at = 2 * np.array([[5, 10, 11], [105, 110, 111]])
    np.testing.assert_array_equal(run.curves.validation_loss, at[..., None] * [1, 1])
    assert np.all(run.curves.seconds >= 0)


def test_a_killed_run_goes_on_from_its_newest_checkpoint(tmp_path):
    whole = train(
        initial_run(), PLAN, counting_trainers([]), evaluate, None, save_every=1
    )

    class Killed(BaseException):
        pass

    def killed_at_step_9(params):
        if params[0] == 10:
            raise Killed
        return evaluate(params)

    with checkpoints.open_checkpoints(tmp_path / "saved") as manager:

        def save(run):
            checkpoints.save(manager, run, {"option": 1}, {"note": "kept"})

        with pytest.raises(Killed):
            train(
                initial_run(),
                PLAN,
                counting_trainers([]),
                killed_at_step_9,
                save,
                save_every=4,
            )
    with checkpoints.open_checkpoints(tmp_path / "saved") as manager:
        # Due after steps 4 and 8: kept at the ends of the rounds that hold them.
        assert manager.all_steps() == [5, 9]
        restored = checkpoints.restore(manager, initial_run())
    assert restored is not None
    run, notes = restored
    assert (run.step, notes) == (9, {"note": "kept"})

    calls = []
    resumed = train(run, PLAN, counting_trainers(calls), evaluate, None, save_every=1)
    assert min(start for _, start, _ in calls) == 9
    jax.tree.map(np.testing.assert_array_equal, resumed.states, whole.states)
    np.testing.assert_array_equal(resumed.curves.train_loss, whole.curves.train_loss)
    np.testing.assert_array_equal(
        resumed.curves.validation_loss, whole.curves.validation_loss
    )


def test_checkpoints_of_other_options_are_an_error_that_lists_them(tmp_path):
    with checkpoints.open_checkpoints(tmp_path) as manager:
        assert checkpoints.restore(manager, initial_run()) is None
        checkpoints.check_options(manager, {})
        saved = {"--layers": 2, "--width": 8}
        checkpoints.save(manager, initial_run(), saved, {})
        checkpoints.check_options(manager, saved)
        now = {"--layers": 3, "--width": 8, "--remat": True}
        with pytest.raises(checkpoints.CheckpointMismatch) as error:
            checkpoints.check_options(manager, now)
    assert "--layers was 2, now 3; --remat was None, now True" in str(error.value)
    assert "--width" not in str(error.value)


def test_thinning_replaces_neighboring_points_by_their_mean():
    curve = np.arange(10.0)[:, None]
    steps, means = thinned(curve, 4)
    assert steps.tolist() == [3, 6, 8, 10]
    assert means[:, 0].tolist() == [1, 4, 6.5, 8.5]
    steps, means = thinned(curve, 100)
    assert steps.tolist() == list(range(1, 11))


def test_a_diverged_arm_is_reported_and_drawn(tmp_path):
    (*_, run) = train_in_turns(initial_run(), PLAN, counting_trainers([]), evaluate)
    run.curves.validation_loss[1, 1:, 0] = np.nan
    run.curves.train_loss[1, 8:, 0] = np.inf
    arms = arm_results(["a", "b"], run.curves, PLAN)
    assert arms[1]["diverged"] == [True, False]
    base, diverged = results_table(arms).splitlines()[2:]
    assert "22.0000" in base
    assert "diverged in 1 of 2" in diverged
    assert "0/2" in diverged

    write_json(arms, tmp_path / "arms.json")
    text = (tmp_path / "arms.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert "null" in text
    learning_curves(arms, "title", 4.7).savefig(tmp_path / "arms.png")
    assert (tmp_path / "arms.png").read_bytes().startswith(b"\x89PNG")
