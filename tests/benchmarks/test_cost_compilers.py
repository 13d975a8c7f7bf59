"""What the compile benchmarks count, ask and report, without their compilers."""

import json
import math
import re

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("flax")

from benchmarks.cost import __main__ as cost
from benchmarks.cost.__main__ import QUICK
from benchmarks.cost.compilers import command, hlo
from benchmarks.cost.compilers.cases import Bars, Case, Sizes, cases
from benchmarks.cost.compilers.report import broken_bars
from benchmarks.json_files import COST

TINY = Sizes(
    layers=4,
    width=8,
    small=(3, 4),
    unrolled=3,
    gpt={"layers": 3, "width": 8, "heads": 2, "vocabulary": 16, "context": 8},
    batch=2,
)

# 48 bytes per array; the fusion reads `a` twice and keeps one result on the chip.
PROGRAM = """HloModule jit_f, is_scheduled=true

%inside (p: f32[3,4]) -> f32[3,4] {
  %p = f32[3,4]{1,0} parameter(0)
  ROOT %m = f32[3,4]{1,0:T(8,128)} multiply(%p, %p)
}

%body (q: f32[3,4]) -> f32[3,4] {
  %q = f32[3,4]{1,0} parameter(0)
  ROOT %ar = f32[3,4]{1,0} all-reduce(%q), to_apply=%sum
}

ENTRY %main.2 (a: f32[3,4], b: bf16[3,4]) -> (f32[3,4], f32[3,4]) {
  %a = f32[3,4]{1,0:T(8,128)} parameter(0), metadata={op_name="u[\\'b\\'](x)"}
  %b = bf16[3,4]{1,0} parameter(1)
  %zero = f32[] constant(0)
  %bc = f32[3,4]{1,0} bitcast(%a)
  %fused.1 = (f32[3,4]{1,0}, /*index=1*/f32[3,4]{1,0:S(1)}) fusion(%a, %bc, %b), backend_config={"estimated_cycles":"700"}
  %first = f32[3,4]{1,0} get-tuple-element(%fused.1), index=0
  %second = f32[3,4]{1,0:S(1)} get-tuple-element(%fused.1), index=1
  %cps = (f32[3,4]{1,0}, f32[3,4]{1,0}, u32[], u32[]) collective-permute-start(%first)
  %cpd = f32[3,4]{1,0} collective-permute-done(%cps)
  %cp.sync = f32[3,4]{1,0} collective-permute(%cpd), source_target_pairs={{1,0}}
  %f2 = f32[3,4]{1,0} fusion(%cp.sync, %second), backend_config={"estimated_cycles":"30"}
  %call = f32[3,4]{1,0} custom-call(%f2), custom_call_target="gemm"
  ROOT %out = (f32[3,4]{1,0}, f32[3,4]{1,0}) tuple(%call, %first)
}
"""  # noqa: E501 # a program as the compiler prints it


def test_every_kernel_counts_its_unique_operands_and_its_results_once():
    assert [kernel.name for kernel in hlo.kernels(PROGRAM)] == [
        *("fused.1", "cps", "cp.sync", "f2", "call"),
    ]
    fused = 48 + 24 + 48  # `a` once, `b`, and the result that is not on the chip
    start = 48 + 48 + 8  # its tuple repeats the operand
    sync, second, call = 48 + 48, 48 + 48, 48 + 48
    assert hlo.traffic(PROGRAM) == fused + start + sync + second + call


def test_a_choice_counts_as_the_branch_that_reads_least():
    text = """ENTRY %main (i: s32[], u: f32[3,4], s: f32[3]) -> f32[3] {
  %i = s32[] parameter(0)
  %u = f32[3,4]{1,0} parameter(1)
  %s = f32[3]{0} parameter(2)
  %little = (f32[3]{0}) tuple(%s)
  %much = (f32[3]{0}, f32[3,4]{1,0}) tuple(%s, %u)
  ROOT %found = f32[3]{0} conditional(%i, %little, %much), branch_computations={%a, %b}
}
"""
    assert (hlo.traffic(text), hlo.seldom(text)) == (12 + 12, 48)


def test_collectives_count_as_pairs_and_in_the_bodies_of_loops_too():
    assert hlo.collectives(PROGRAM) == {"all-reduce": 1, "collective-permute": 2}


def test_custom_calls_and_cycles_are_read_from_the_program():
    assert hlo.custom_calls(PROGRAM) == 1
    assert hlo.cycles(PROGRAM) == 730


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("f32[3,4]{1,0:T(8,128)}", 48),
        ("f32[3,4]{1,0:T(8,128)S(1)}", 0),
        ("(f32[2]{0}, s32[], pred[5]{0})", 17),
        ("bf16[3]", 6),
        ("f8e4m3fn[3]", 3),
        ("s4[6]", 3),
        ("token[]", 0),
    ],
)
def test_sizes_are_those_in_main_memory(text, size):
    assert hlo.num_bytes(text) == size


def test_the_count_agrees_with_a_program_compiled_here():
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    text = jax.jit(lambda x: 2 * jnp.sin(x)).lower(x).compile().as_text()
    assert hlo.traffic(text) == 2 * 64 * 32 * 4
    assert hlo.collectives(text) == {}


def test_every_case_can_be_traced_and_takes_over_what_it_may():
    names = []
    for case in cases(jax.devices()[:1], TINY):
        assert case.name not in names
        assert case.base is None or case.base in names
        names.append(case.name)
        # A step takes over the memory of parameters and state, an update nothing.
        traced = case.function.trace(*case.arguments)
        donated = [
            all(leaf.donated for leaf in jax.tree.leaves(argument))
            for argument in traced.args_info[0]
        ]
        assert sum(donated) == 2 * ("step" in case.name), case.name
        assert (case.unit > 0, case.num_devices) == (True, 1)
    assert set(QUICK) <= set(names)


@pytest.mark.parametrize("name", ["", ", results in another order"])
def test_results_overwrite_their_own_arguments_unless_in_another_order(name):
    for case in cases(jax.devices()[:1], TINY):
        if case.name == f"step, Adam{name}":
            break
    lowered = case.function.lower(*case.arguments).as_text()
    overwritten = [int(n) for n in re.findall(r"tf.aliasing_output = (\d+)", lowered)]
    num_results = len(jax.tree.leaves(case.arguments[:2]))
    assert sorted(overwritten) == list(range(num_results))
    assert (overwritten == sorted(overwritten)) == (not name)


def case_of(name, function, bars, base=None):
    x = jax.ShapeDtypeStruct((4,), jnp.float32)
    x = x.update(sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    return Case(name, jax.jit(function), (x,), 16, bars, base)


def test_broken_bars_and_refusals_are_told_and_exit_with_1(
    tmp_path, monkeypatch, capsys
):
    def refused(x):
        raise TypeError("too many\nlines")

    def some(devices):
        at_most = Bars(tpu={"bytes": (0, 2.05)})
        return [
            case_of("base", jnp.sin, at_most),
            case_of("slow", jnp.sin, Bars(tpu={"bytes / base": (0, 1.4)}), "base"),
            case_of("refused", refused, at_most),
            case_of("unmeasured", jnp.sin, Bars(tpu={"kernels": (1, 1)})),
        ]

    def measure(compiled, case):
        return {"bytes": 2.0 if case.base is None else 3.0, "collectives": 0}

    monkeypatch.setattr(command, "cases", some)
    monkeypatch.setattr(command.tpu, "TOPOLOGIES", ("here",))
    monkeypatch.setattr(command.tpu, "devices_of", lambda topology: jax.devices()[:1])
    monkeypatch.setattr(command.tpu, "measure", measure)
    options = ["tpu", "--out", str(tmp_path / "report.json")]
    assert cost.main(options) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    found = report["topologies"]["here"]["cases"]
    assert {name: broken_bars(of) for name, of in found.items()} == {
        "base": [],
        "slow": ["bytes / base 1.50, asked: ≤ 1.4"],
        "refused": ["refused: TypeError: too many"],
        "unmeasured": ["kernels nan, asked: = 1"],
    }
    assert "3 broken bars" in capsys.readouterr().out
    assert cost.main([*options, "--only", "base"]) == 0
    assert cost.main([*options, "--only", "no such case"]) == 1


@pytest.mark.parametrize("compiler", ["tpu", "gpu"])
def test_committed_results_hold_cases_that_there_are_and_no_broken_bar(compiler):
    # Not all: a new operator or case is measured when somebody measures.
    report = json.loads((COST / f"{compiler}.json").read_text())
    names = [case.name for case in cases(jax.devices()[:1])]
    for of_topology in report["topologies"].values():
        found = of_topology["cases"]
        assert found
        assert list(found) == [name for name in names if name in found]
        for name, result in found.items():
            assert broken_bars(result) == [], name
            assert all(math.isfinite(x) for x in result["measures"].values()), name
