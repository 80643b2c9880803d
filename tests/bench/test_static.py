"""The machine code of every kernel, for GPUs that are not here: `python -m bench static`, and that it can fail."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import sass as machine_code
from bench import wgmma
from bench.expectations import (
    AWAITED,
    NO_SPILLS,
    PIPELINED,
    SHARED_MEMORY,
    Compiled,
    broken,
    multiplies_with,
    vectors,
    wide,
)
from bench.options import parse
from bench.sass import Loop
from tribp.launch.arch import ARCHS
from tribp.versions import keeps_shared_tiles, triton_version

from ..processes import called, forked, python
from .machine_code import sass
from .test_static_conv import BAD, GOOD
from .test_static_conv import plant as plant_conv

Row = dict[str, Any]


@pytest.mark.parametrize("options", [("--dtype", "float99"), ("--case", "9x9")], ids=lambda words: words[0])
def test_what_selects_nothing_is_an_error(options: tuple[str, str]) -> None:
    from bench.compile import calls

    with pytest.raises(ValueError, match=r"^there is no such case; there are types bfloat16.*; --all has more$"):
        list(calls(parse(["static", "linear", *options])))


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("when", ["compiling", "importing torch"])
def test_ctrl_c_ends_it_in_a_line(when: str) -> None:
    code = f"""
        import os, signal, sys, threading
        from bench.__main__ import main
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupt = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)
        if {when == "compiling"}:
            import triton
            triton.compile = interrupt
        else:
            threading.Timer(1, interrupt).start()
        sys.exit(main(["static", "linear"]))
    """
    done = python("-c", code, start_new_session=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "bench: interrupted\n")


def compile_everything(folder: Path, *options: str) -> list[Row]:
    file = folder / "static.json"
    done = forked("-m", "bench", "static", "--json", str(file), *options)
    assert done.returncode in (0, 1), done.stderr
    rows: list[Row] = json.loads(file.read_text())
    assert done.returncode == any(row["broken"] for row in rows)
    return rows


# 59 kernels in 34 s of a core; of every shape and type there are 170, which take 116.
QUICK = [
    "4096x4096x4096 bfloat16", "65536x256x784 bfloat16", "1000x77x333 bfloat16",
    "64x64-64x56x56 bfloat16 NHWC", "256x256-256x14x14 bfloat16", "64x13-11x33x29 bfloat16",
    "256x3-64x224x224 bfloat16 NHWC", "262144x64x64x64x16 bfloat16", "Adam ",
]  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], list[Row]]:
    """A target's kernels, compiled once: all, or those that most steps are made of."""

    def rows(target: str, every_type: bool) -> list[Row]:
        some = [] if every_type else [f"--case={name}" for name in QUICK]
        return compile_everything(tmp_path_factory.mktemp("static"), *some, "--target", target)

    return functools.cache(rows)


@pytest.fixture
def rows(compiled: Callable[[str, bool], list[Row]], target: str, every_type: bool) -> list[Row]:
    """Of the test's target."""
    return compiled(target, every_type)


def on(target: str, *values: str, every_type: bool = True) -> Any:
    """Test parameters. What a target's kernels take to compile: `.ci/run` and the workflow have the others compiled."""
    slow = target != "sm_90" or every_type
    return pytest.param(target, *values, every_type, marks=[pytest.mark.slow] * slow)


def complaints(rows: list[Row], expectation: str) -> list[str]:
    """What breaks this expectation; fails where nothing was expected to keep it."""
    assert any(expectation in row["expected"] for row in rows), f"nobody expects {expectation}"
    return [
        f"{row['target']} {row['kernel']} {row['settings']} [{row['cases'][0]}]: {sentence}"
        for row in rows
        for sentence in row["broken"]
        if sentence.startswith((expectation, "does not compile"))
    ]


EXPECTATIONS = [
    "spills", "shared memory", "matrix instructions", "pipelined", "wide stores", "wide loads", "vectors",
    "the launch before",
]  # fmt: skip


@pytest.mark.parametrize(("target", "every_type"), [on("sm_90", every_type=False), *map(on, ARCHS)])
@pytest.mark.parametrize("expectation", EXPECTATIONS)
def test_machine_code(rows: list[Row], target: str, expectation: str) -> None:
    found = complaints(rows, expectation)
    if triton_version() < (3, 6) and (target, expectation) == ("sm_100", "spills"):
        # Triton 3.5 keeps both halves of a tf32x3 operand in registers on sm_100 (1,044 bytes spilled); 3.6 does not.
        found = [complaint for complaint in found if "float32" not in complaint]
    assert found == []


@pytest.mark.parametrize(("target", "every_type"), [on("sm_90", every_type=False), on("sm_90")])
@pytest.mark.parametrize("expectation", wgmma.EXPECTED)
def test_asynchronous_products(rows: list[Row], expectation: str) -> None:
    assert complaints(rows, expectation) == []


@pytest.mark.slow
@pytest.mark.parametrize("target", ARCHS)
def test_machine_code_of_every_type_at_every_shape(target: str, tmp_path: Path) -> None:
    rows = compile_everything(tmp_path, "--all", "--target", target)
    expected = [*EXPECTATIONS, *(wgmma.EXPECTED if target == "sm_90" else [])]
    assert [complaint for expectation in expected for complaint in complaints(rows, expectation)] == []


@pytest.fixture(scope="module")
def all_listed() -> list[Row]:
    rows: list[Row] = called(list_kernels)
    return rows


def list_kernels() -> list[Row]:
    """What `bench static` compiles for all targets, with nothing compiled."""
    from bench.compile import calls, collect, row

    return [row(kernel, Compiled(0)) for kernel in collect(calls(parse(["static"]))).values()]


@pytest.fixture
def listed(all_listed: list[Row], target: str) -> list[Row]:
    """Of the test's target."""
    return [row for row in all_listed if row["target"] == target]


each_target = pytest.mark.parametrize("target", ARCHS)


@each_target
def test_every_kernel_and_type_is_compiled(listed: list[Row], target: str) -> None:
    mine = [row for row in listed if row["operation"] == "linear"]
    found = {(row["kernel"], row["dtype"]) for row in mine}
    for kernel in ("forward", "output_grad", "dgrad", "wgrad"):
        for dtype in ("bfloat16", "float16", "float32", "float64"):
            assert (kernel, dtype) in found
    assert "reduce_partials" in {kernel for kernel, _ in found}
    switches = {name for row in mine for name in row["settings"].split()}
    assert {"prefetch", "x_transposed", "w_transposed"} <= switches
    assert ("tma" in switches) == ARCHS[target].has_tma


@each_target
def test_every_form_of_the_convolution_is_compiled(listed: list[Row], target: str) -> None:
    mine = [row for row in listed if row["operation"] == "conv"]
    found = {(row["kernel"], row["dtype"]) for row in mine}
    dense, small = {"forward", "dgrad", "wgrad"}, {"few_channels_forward", "few_channels_wgrad"}
    depthwise = {"depthwise_forward", "depthwise_dgrad", "depthwise_wgrad"}
    for dtype in ("bfloat16", "float32"):
        assert found >= {(kernel, dtype) for kernel in dense | small | depthwise}
    assert {kernel for kernel, dtype in found if dtype == "bfloat16"} >= {"relayout", "pack", "reduce_partials"}

    def forms(*kernels: str) -> set[str]:
        return {word for row in mine if row["kernel"] in kernels for word in row["settings"].split()}

    for kernel in ("forward", "dgrad", "wgrad"):
        assert "diagonal" in forms(kernel)
        assert any(word.startswith("groups_per_tile") for word in forms(kernel))
        assert ("tma" in forms(kernel)) == ARCHS[target].has_tma
    assert {"channels_last", "sigmoid"} <= forms("forward") & forms("few_channels_forward")
    assert {"fuse_dz", "taps_last"} <= forms("few_channels_wgrad")
    assert {"src_pixels", "y_pixels", "dst_channels"} <= forms("relayout")
    assert {"src_pixels", "src_channels", "third_src_channels"} <= forms("pack")
    for kernel in ("forward", "dgrad", "few_channels_forward", *depthwise):
        layouts = {"channels_last" in row["settings"].split() for row in mine if row["kernel"] == kernel}
        assert layouts == {True, False}, kernel


@each_target
def test_every_rule_and_switch_of_the_optimizers_is_compiled(listed: list[Row], target: str) -> None:
    mine = [row for row in listed if row["operation"] == "optim"]
    steps = [row for row in mine if row["kernel"] == "multi_tensor_step"]
    rules = {(row["settings"].split()[0], row["dtype"]) for row in steps}
    names = ("sgd", "rmsprop", "adagrad", "adam")
    assert rules >= {(rule, "float32") for rule in names}
    assert rules >= {("adam", dtype) for dtype in ("bfloat16", "float16", "float64")}
    switches = {name for row in steps for name in row["settings"].split()}
    assert switches >= {
        "grad_scale", "grad_norm", "ema_type", "on_device", "eps_inside", "stochastic", "optional", "layout_dims6",
        "fp32,fp32,fp32", "bf16,bf16",
    }  # fmt: skip
    assert {row["dtype"] for row in mine if row["kernel"] == "gradient_norm"} >= {"float32"}


@pytest.mark.parametrize(("target", "every_type"), [on("sm_80"), on("sm_90", every_type=False), on("sm_100")])
def test_float32_adam_moves_its_seven_streams_in_whole_vectors(rows: list[Row], target: str) -> None:
    """Read off the counts, not through the expectations: a chunk's 4 loads and 3 stores, as often as a thread needs."""
    (row,) = (row for row in rows if row["cases"][0] == "Adam 1000+4M float32")
    vectors = row["constants"]["BLOCK"] // (128 * 4)
    assert (row["counts"]["LDG.128"], row["counts"]["STG.128"]) == (4 * vectors, 3 * vectors)


@pytest.mark.parametrize(
    ("target", "instruction", "every_type"),
    [on("sm_80", "HMMA"), on("sm_90", "HGMMA", every_type=False), on("sm_100", "UTCHMMA"), on("gfx942", "v_mfma")],
)
def test_large_bfloat16_products_use_the_targets_own_matrix_instruction(
    rows: list[Row], target: str, instruction: str
) -> None:
    """Read off the counts, not through the expectations."""
    named = ("4096x4096x4096 bfloat16", "256x256-256x14x14 bfloat16")
    products = {
        (row["operation"], row["kernel"]): row
        for row in rows
        if row["kernel"] in ("forward", "dgrad", "wgrad") and any(case.startswith(named) for case in row["cases"])
    }
    assert set(products) == {(operation, k) for operation in ("linear", "conv") for k in ("forward", "dgrad", "wgrad")}
    for (operation, kernel), row in products.items():
        if instruction == "HGMMA" and (operation, kernel) == ("conv", "wgrad") and not keeps_shared_tiles():
            continue  # by mma.sync
        assert row["counts"][instruction] == sum(row["counts"].get(name, 0) for name in machine_code.MATRIX)
        assert all(loop["matrix"] and loop["loads"] and loop["loads_before"] for loop in row["loops"])


# -- the checks can fail: kernels that are compiled badly on purpose --------------------------------------------------


def plant() -> dict[str, Any]:
    """Compile bad launches, and good ones beside them. Runs in a process of its own, without the interpreter."""
    import torch

    from bench.compile import read_launches, source_of
    from bench.linear import OPERATION, LinearCase, expectations
    from tests.launch.plans import with_settings
    from tribp.launch.launches import Launch
    from tribp.launch.plan import launches_of

    def forward(shape: tuple[int, int, int], dtype: torch.dtype, target: str) -> Launch:
        return OPERATION.launches(LinearCase(shape, dtype), "forward", ARCHS[target])[0]

    def changed(launch: Launch, warps: int = 0, stages: int = 0, **constants: object) -> Launch:
        launch = with_settings(launch, **constants)
        return launch._replace(num_warps=warps or launch.num_warps, num_stages=stages or launch.num_stages)

    even, odd = (8192, 1024, 1024), (1000, 77, 333)
    sm_80, narrow = forward(even, torch.bfloat16, "sm_80"), forward(odd, torch.bfloat16, "sm_80")
    single = forward(even, torch.float32, "sm_80")
    amd = forward(even, torch.bfloat16, "gfx942")
    plants = {
        "good": ("sm_80", torch.bfloat16, sm_80),
        "good odd": ("sm_80", torch.bfloat16, narrow),
        "good amd": ("gfx942", torch.bfloat16, changed(amd, stages=2)),
        "four warps": ("sm_80", torch.bfloat16, changed(sm_80, warps=4, BLOCK_M=128, BLOCK_N=256)),
        "ieee": ("sm_80", torch.float32, changed(single, PRECISION="ieee")),
        "one stage": ("sm_80", torch.bfloat16, changed(sm_80, stages=1)),
        "one stage, amd": ("gfx942", torch.bfloat16, changed(amd, stages=1)),
        "no prefetch": ("sm_80", torch.bfloat16, changed(narrow, PREFETCH=False)),
        "narrow store": ("sm_80", torch.bfloat16, changed(sm_80, VEC_STORE=1)),
        "eight stages": ("sm_80", torch.bfloat16, changed(sm_80, stages=8)),
        "a tile of 24": ("gfx942", torch.bfloat16, changed(amd, BLOCK_K=24)),
    }
    found: dict[str, Any] = {}
    for name, (target, dtype, launch) in plants.items():
        good = launch if name.startswith("good") else plants["good odd" if name == "no prefetch" else "good"][2]
        right = good if name == "narrow store" else launch
        expected = list(expectations(right, LinearCase(even, dtype), ARCHS[target]))
        ((code, _),) = read_launches([launch], ARCHS[target])
        found[name] = broken(code, [NO_SPILLS, SHARED_MEMORY, *expected])

    # An optimizer's step: two elements a thread are no vector, 32 of them do not fit the registers.
    from bench import optim

    for target in ("sm_80", "gfx942"):
        for name, block in (("good", None), ("narrow", 256), ("spilling", 4096)):
            (step,) = optim.OPERATION.launches(optim.ADAM, "step", ARCHS[target])
            step = step if block is None else changed(step, warps=4, BLOCK=block)
            if block != 4096 or target == "sm_80":
                ((code, _),) = read_launches([step], ARCHS[target])
                expected = [NO_SPILLS, *optim.expectations(step, optim.ADAM, ARCHS[target])]
                found[f"{name} step, {target}"] = broken(code, expected)

    x = torch.empty(1 << 20, 16, device="meta", dtype=torch.bfloat16)
    from tribp.ops.activations import Activation
    from tribp.ops.linear.plan import sum_rows

    def pass_over(dy: torch.Tensor, y: torch.Tensor, dz: torch.Tensor | None, db: torch.Tensor | None) -> Launch:
        def build(plan: Any, dy: Any, y: Any, dz: Any, db: Any) -> None:
            sum_rows(plan, dy, y, Activation("sigmoid"), dz, db)

        return launches_of(build, ARCHS["sm_90"], (dy, y, dz, db))[0]

    column = pass_over(x.t()[:16, :4096].t(), x[:4096], None, x.new_empty(16))
    transposed = pass_over(x.new_empty(16, 4096).t(), x[:4096], x[:4096], None)
    broadcast = pass_over(x.new_empty(()).expand(4096, 16), x[:4096], x[:4096], None)
    tma = forward(even, torch.bfloat16, "sm_90")
    small = OPERATION.launches(LinearCase((64, 1, 16), torch.bfloat16), "forward", ARCHS["sm_80"])[0]
    far = small._replace(arguments=(*small.arguments[:4], 1 << 40, *small.arguments[5:]))
    for name, launch in dict(
        column=column, transposed=transposed, broadcast=broadcast, tma=tma, small=small, far=far
    ).items():
        source, options = source_of(launch, ARCHS["sm_90" if launch is not small and launch is not far else "sm_80"])
        at = {key[0]: value for key, value in source.attrs.items() if value}
        names = launch.kernel.arg_names
        found[f"source of {name}"] = {
            "signature": dict(source.signature),
            "ones": [
                names[key[0]] for key, value in source.constants.items() if value == 1 and names[key[0]].islower()
            ],
            "aligned": [names[n] for n, value in at.items() if ["tt.divisibility", 16] in [list(v) for v in value]],
            "options": [options["num_warps"], options["num_stages"]],
        }
    return found


@pytest.fixture(scope="module")
def planted() -> dict[str, Any]:
    found: dict[str, Any] = called(plant)
    return found


@pytest.fixture(scope="module")
def planted_conv() -> dict[str, list[str]]:
    found: dict[str, list[str]] = called(plant_conv)
    return found


@pytest.mark.parametrize("name", ["good", "good odd", "good amd", "good step, sm_80", "good step, gfx942"])
def test_a_good_launch_breaks_nothing(planted: dict[str, Any], name: str) -> None:
    assert planted[name] == []


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("four warps", "spills"),  # 128×256 accumulators in 128 threads: 256 registers each
        ("ieee", "matrix instructions"),  # float32 without TF32 is FFMA
        ("one stage", "pipelined"),
        ("one stage, amd", "pipelined"),
        ("no prefetch", "pipelined"),  # two-byte loads: the compiler pipelines four and more
        ("narrow store", "wide stores"),
        ("eight stages", "shared memory"),  # 8 · 32 KB
        ("a tile of 24", "does not compile"),  # no power of 2
        ("narrow step, sm_80", "vectors"),
        ("narrow step, gfx942", "vectors"),
        ("spilling step, sm_80", "spills"),
    ],
)
def test_a_bad_launch_is_caught(planted: dict[str, Any], name: str, complaint: str) -> None:
    assert any(sentence.startswith(complaint) for sentence in planted[name]), planted[name]


@pytest.mark.slow  # what is expected of which kernel is tested with nothing compiled: `test_static_conv.py`
@pytest.mark.parametrize("name", GOOD)
def test_a_good_convolution_breaks_nothing(planted_conv: dict[str, list[str]], name: str) -> None:
    assert planted_conv[name] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_a_bad_convolution_is_caught(planted_conv: dict[str, list[str]], name: str) -> None:
    _, complaint, _ = BAD[name]
    assert any(sentence.startswith(complaint) for sentence in planted_conv[name]), planted_conv[name]


def test_arguments_are_specialized_as_at_a_launch(planted: dict[str, Any]) -> None:
    """The rules by hand: 16-byte pointers and multiples of 16 are marked, a 1 is a constant, unless the kernel says no.

    `dy`'s strides are the only integers that kernels let Triton specialize.
    """
    found = {name.removeprefix("source of "): value for name, value in planted.items() if name.startswith("source")}
    assert found["column"]["signature"]["dz"] == "constexpr"  # None
    assert found["column"]["ones"] == ["stride_dyn"]
    assert found["column"]["aligned"] == ["dy", "y", "db", "stride_dym"]  # 16, and M, N left alone
    assert found["transposed"]["ones"] == ["stride_dym"]
    assert found["transposed"]["aligned"] == ["dy", "y", "dz", "stride_dyn"]
    assert found["broadcast"]["ones"] == []
    assert found["broadcast"]["aligned"] == ["dy", "y", "dz", "stride_dym", "stride_dyn"]  # both 0
    assert found["tma"]["signature"]["x"] == "tensordesc<bf16[128, 64]>"
    assert found["tma"]["aligned"] == ["b"]
    assert found["small"]["signature"] | dict(M="i64") == found["far"]["signature"]
    assert found["small"]["signature"]["x"] == "*bf16"
    assert found["small"]["signature"]["N"] == "i32"  # a 1, in do_not_specialize
    assert found["small"]["aligned"] == ["x", "w", "b", "y"]  # not K = 16 either
    assert found["tma"]["options"] == [4, 3]


# -- reading machine code: by hand, on a few lines --------------------------------------------------------------------


def test_a_pipelined_loop_is_seen_and_one_that_is_not() -> None:
    loop = ["LDGSTS.E.128 [R1], [R2.64]", "HMMA.16816.F32 R4, R8, R12, R4", "ISETP.NE.AND P0, PT, R0, RZ, PT"]
    pipelined = sass("LDGSTS.E.128 [R1], [R2.64]", *loop, "@P0 BRA 0x10", "STG.E.128 [R2.64], R4", "EXIT")
    assert machine_code.matrix_loops(pipelined) == [Loop(1, loads=1, loads_before=1, loads_early=True, spills=0)]
    waiting = sass("MOV R1, R1", *loop, "@P0 BRA 0x10", "LDG.E R3, [R2.64]", "EXIT")
    assert machine_code.matrix_loops(waiting) == [Loop(1, loads=1, loads_before=0, loads_early=True, spills=0)]
    late = sass("LDG.E R1, [R2.64]", "HMMA.16816.F32 R4, R8, R12, R4", "LDG.E R1, [R2.64]", "@P0 BRA 0x10", "EXIT")
    assert machine_code.matrix_loops(late) == [Loop(1, loads=1, loads_before=1, loads_early=False, spills=0)]


@pytest.mark.parametrize(
    ("instructions", "complaint"),
    [
        (["ACQBULK", "LDG.E R1, [R2.64]", "EXIT"], ""),
        (["LDC R1, c[0x0][0x28]", "ACQBULK", "UTMALDG.2D [UR8], [UR4]", "EXIT"], ""),  # an argument is there
        (["LDG.E R1, [R2.64]", "ACQBULK", "EXIT"], "LDG before ACQBULK"),
        (["UTMALDG.2D [UR8], [UR4]", "ACQBULK", "EXIT"], "UTMALDG before ACQBULK"),
        (["STG.E [R2.64], R1", "ACQBULK", "EXIT"], "STG before ACQBULK"),
        (["ATOMG.E.ADD R1, [R2.64], R3", "EXIT"], "ATOMG before ACQBULK"),
        (["MOV R1, R1", "EXIT"], "no ACQBULK"),
    ],
)
def test_what_does_not_wait_for_the_launch_before_is_seen(instructions: list[str], complaint: str) -> None:
    assert machine_code.unawaited(sass(*instructions)) == complaint


def test_a_loop_around_the_loop_is_not_its_prologue() -> None:
    """A persistent kernel loads its bias after the inner loop and comes back: that is no load ahead of it."""
    code = sass(
        "MOV R0, R0",  # 00 outer loop
        "LDGSTS.E [R1], [R2.64]",  # 10 inner loop
        "HMMA.16816.F32 R4, R8, R12, R4",
        "LDL R9, [R1]",
        "@P0 BRA 0x10",
        "LDG.E R3, [R2.64]",  # 50 the bias
        "BRA.U UP0, 0x0",
        "EXIT",
    )
    assert machine_code.matrix_loops(code) == [Loop(1, loads=1, loads_before=0, loads_early=True, spills=1)]


def test_a_loop_laid_out_from_its_middle_is_read_from_its_head() -> None:
    text = """
	global_load_dwordx4 v[0:3], v4, s[0:1]
	s_branch .LBB0_2
.LBB0_1:
	v_mfma_f32_32x32x8_bf16 v[2:17], v[66:67], v[58:59], v[2:17]
	s_cbranch_scc0 .LBB0_3
.LBB0_2:
	buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
	s_branch .LBB0_1
.LBB0_3:
	buffer_store_dwordx2 v[0:1], v4, s[0:3], 0 offen
	s_endpgm
"""
    code = machine_code.parse_amd(text)
    assert machine_code.matrix_loops(code) == [Loop(1, loads=1, loads_before=1, loads_early=True, spills=0)]
    assert machine_code.count(code) == {"load": 2, "load.128": 2, "store": 1, "store.64": 1, "v_mfma": 1}


def test_several_kernels_of_one_disassembly_are_told_apart() -> None:
    text = "\n".join(
        f"  /*{a:04x}*/  {op} ;" for a, op in [(0, "HMMA.F32 R1"), (16, "EXIT"), (32, "LDG.E.128 R1"), (48, "EXIT")]
    )
    first, second = machine_code.parse_sass(text, [32, 64])
    assert [i.name for i in first] == ["HMMA", "EXIT"]
    assert machine_code.count(second) == {"LDG": 1, "LDG.128": 1}


def test_checks_on_made_up_findings() -> None:
    good = Compiled(1000, 100, 0, 900, 9, {"HGMMA": 4, "LDG": 1, "STG": 3, "STG.128": 2},
                    (Loop(4, 2, 4, True, 0),))  # fmt: skip
    matrix = multiplies_with("HGMMA", reason="")
    stores = wide("stores", 128, "")
    checks = [NO_SPILLS, SHARED_MEMORY, AWAITED, matrix, PIPELINED, stores]
    assert broken(good, checks) == []

    def bad(**changes: Any) -> list[str]:
        return [s.split(":")[0] for s in broken(Compiled(**{**good.__dict__, **changes}), checks)]

    assert bad(spilled=4) == ["spills"]
    assert bad(unawaited="no ACQBULK") == ["the launch before"]
    assert bad(shared_memory=1001) == ["shared memory"]
    assert bad(counts={"HMMA": 4, "STG.128": 1, "STG": 1}) == ["matrix instructions"]
    assert bad(loops=()) == ["matrix instructions", "pipelined"]
    assert bad(loops=(Loop(4, 2, 0, True, 0),)) == ["pipelined"]
    assert bad(loops=(Loop(4, 2, 4, False, 0),)) == ["pipelined"]
    assert bad(counts={"HGMMA": 4, "UTMALDG": 2, "UTMASTG": 1}, loops=(Loop(4, 2, 4, False, 0),)) == []
    assert bad(counts={"HGMMA": 4, "STG": 3, "STG.128": 1}) == ["wide stores"]

    for counts in ({"LDG.128": 4, "STG.128": 3}, {"load.128": 5, "store.128": 3}):
        step = Compiled(**{**good.__dict__, "counts": counts})
        assert broken(step, [vectors(4, 3, "")]) == []
        assert len(broken(step, [vectors(4, 4, "")])) == len(broken(step, [vectors(6, 3, "")])) == 1
