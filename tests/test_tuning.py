"""Rules, what takes the place of their answers, and the settings around these: valid, right, and in a fixed order."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tribp
from tribp.launch import tuning
from tribp.launch.arch import ARCHS, INTERPRETER, Arch
from tribp.launch.conv3x3 import choose_conv
from tribp.launch.linear_sigmoid import choose_forward
from tribp.launch.matmul import Product, basis, choose_sum
from tribp.launch.optim import choose_step
from tribp.launch.search import GAIN, search
from tribp.launch.tuning import Question, hearing, rules_answer
from tribp.launch.variants import AROUND, variants

from .conv3x3_cases import ieee as ieee
from .oracle import TOLERANCE, error
from .tuning_cases import check, questions

ROOT = Path(__file__).parents[1]
MACHINES = {**ARCHS, "interpreter": INTERPRETER}
SM_90 = ARCHS["sm_90"]


def ask(m: int = 8192) -> Product:
    return choose_forward(m, 1024, 1024, "bfloat16", "ieee", SM_90, vec=8, tma=True)


def question_of(call: Callable[[], object]) -> Question:
    with hearing() as heard:
        call()
    (question,) = heard.questions.values()
    return question


# -- variants


@pytest.mark.parametrize("machine", MACHINES)
def test_every_variant_of_every_rule_is_valid(machine: str) -> None:
    asked = questions(MACHINES[machine])
    assert {question.rule for question in asked.values()} == set(tuning.rules()) == set(AROUND)
    tried = dict.fromkeys(AROUND, 0)
    for at, question in enumerate(asked.values()):
        first = rules_answer(question)
        check(question, first)
        around = variants(question, first)
        assert first not in around
        assert len(set(around)) == len(around)
        tried[question.rule] += len(around)
        # A search goes on from there; a step from one of them takes turns, for all would be ten thousands.
        further = variants(question, around[at % len(around)]) if around else []
        for settings in [*around, *further]:
            check(question, settings)
            assert settings.reason == first.reason
    assert min(tried.values()) > 0, tried


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ("choose_forward", {"block_i", "block_j", "block_l", "num_warps", "num_stages", "tma", "persistent", "group",
                            "max_registers"}),
        ("choose_dgrad", {"fuse_dz"}),
        ("choose_wgrad", {"fuse_dz", "splits"}),
        ("choose_conv", {"box", "flat", "block_i", "block_j", "block_l", "tma", "num_stages", "num_warps", "group"}),
        ("choose_conv_wgrad", {"box", "taps", "splits", "block_i", "block_j", "block_l", "tma", "num_stages"}),
        ("choose_small", {"box", "block_i", "block_j", "num_warps"}),
        ("choose_depthwise", {"box", "block_i", "block_j", "num_warps", "splits"}),
        ("choose_pass", {"block_m", "block_n", "rows", "num_warps"}),
        ("choose_sum", {"block_parts", "block", "num_warps"}),
        ("choose_step", {"block", "chunk_blocks", "num_warps"}),
        ("choose_relayout", {"block_p", "block_c", "tiles", "num_warps", "max_registers"}),
    ],
)  # fmt: skip
def test_all_that_can_be_varied_is(rule: str, fields: set[str]) -> None:
    changed = set()
    for question in questions(SM_90).values():
        if question.rule == rule:
            first = tuning.encode(rules_answer(question))
            for settings in variants(question, rules_answer(question)):
                changed |= {name for name, value in tuning.encode(settings).items() if value != first[name]}
    assert fields <= changed


def linear(
    dtype: torch.dtype, n: int = 16, k: int = 24, needs: str = "xwb"
) -> tuple[Callable[[], Mapping[str, Tensor]], Mapping[str, Tensor]]:
    x, w, b, dy = (torch.randn(size, dtype=torch.float64).to(dtype) for size in ((40, k), (n, k), (n,), (40, n)))
    w = w / 5
    return differentiated(tribp.linear_sigmoid, lambda *t: torch.sigmoid(F.linear(*t)), (x, w, b), dy, needs)


def convolution(
    c: int, groups: int = 1, *, last: bool = True, activation: str | None = None, needs: str = "xwb"
) -> tuple[Callable[[], Mapping[str, Tensor]], Mapping[str, Tensor]]:
    layout = torch.channels_last if last else torch.contiguous_format
    x, w = torch.randn(1, c, 5, 7).to(memory_format=layout), torch.randn(16 if groups == 1 else c, c // groups, 3, 3)
    dy = torch.randn(1, len(w), 5, 7).to(memory_format=layout)

    def exact(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = F.conv2d(x, w, b, 1, 1, 1, groups)
        return torch.sigmoid(y) if activation else y

    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return tribp.conv3x3(x, w, b, 1, 1, groups, activation)

    return differentiated(ours, exact, (x, w / c, torch.randn(len(w))), dy, needs)


def differentiated(
    ours: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    dy: Tensor,
    needs: str = "xwb",
) -> tuple[Callable[[], Mapping[str, Tensor]], Mapping[str, Tensor]]:
    def results(function: Callable[..., Tensor], dtype: torch.dtype) -> Mapping[str, Tensor]:
        given = {
            name: t.detach().to(dtype).requires_grad_(name in needs) for name, t in zip("xwb", inputs, strict=True)
        }
        y = function(*given.values())
        grads = torch.autograd.grad(y, [given[name] for name in needs], dy.to(dtype)) if needs else ()
        return {"y": y.detach(), **dict(zip(needs, grads, strict=True))}

    return lambda: results(ours, dy.dtype), results(exact, torch.float64)


def step() -> tuple[Callable[[], Mapping[str, Tensor]], Mapping[str, Tensor]]:
    values, grads = torch.randn(500), torch.randn(500)

    def results(optimizer: Any, dtype: torch.dtype) -> Mapping[str, Tensor]:
        p = torch.nn.Parameter(values.to(dtype, copy=True))
        p.grad = grads.to(dtype)
        optimizer([p], lr=0.1).step()
        return {"p": p.detach()}

    return lambda: results(tribp.optim.Adam, torch.float32), results(torch.optim.Adam, torch.float64)


CALLS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "linear, TMA": (lambda: linear(torch.float16), {"choose_wgrad", "choose_dgrad"}),
    "linear, float64": (lambda: linear(torch.float64, needs=""), {"choose_forward"}),
    "linear, odd rows": (lambda: linear(torch.float16, 7, 19, "b"), {"choose_forward", "choose_pass", "choose_sum"}),
    "dense": (lambda: convolution(24, needs=""), {"choose_conv"}),
    "dense wgrad": (lambda: convolution(24, needs="w"), {"choose_conv_wgrad"}),
    "dense, NCHW": (lambda: convolution(9, last=False, activation="sigmoid", needs="b"), {"choose_relayout"}),
    "small": (lambda: convolution(3), {"choose_small"}),
    "depthwise": (lambda: convolution(6, 6), {"choose_depthwise"}),
    "step": (step, {"choose_step"}),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("ieee")
def test_variants_compute_what_the_rules_settings_do(name: str, kernels: str) -> None:
    make, rules = CALLS[name]
    call, exact = make()
    with hearing() as heard:
        call()
    left = set(rules)
    for question in heard.questions.values():
        if question.rule not in left:
            continue
        left.remove(question.rule)
        for settings in variants(question, rules_answer(question)):
            with hearing({question.key: settings}):
                found = call()
            for result, value in found.items():
                tolerance = 2 * TOLERANCE[value.dtype if name == "linear, float64" else found[result].dtype]
                assert error(found[result], exact[result]) <= tolerance, (result, question.rule, settings)
    assert not left


def compiled() -> dict[str, list[str]]:
    """What the compiler says to some variants for every target. Runs in a process without the interpreter."""
    from bench import conv3x3
    from bench import linear_sigmoid as linear
    from bench.compile import compile_launches
    from bench.conv3x3 import ConvCase
    from bench.operation import Case

    found: dict[str, list[str]] = {}
    for name, arch in ARCHS.items():
        calls: list[Callable[[Arch], Any]] = [
            lambda arch: linear.launches(Case((4096, 1024, 1024), torch.bfloat16), "forward", arch),
            lambda arch: conv3x3.launches(ConvCase((64, 64, 64, 56, 56), torch.bfloat16), "forward", arch),
        ]
        for call in calls:
            question = question_of(lambda call=call, arch=arch: call(arch))  # type: ignore[misc]
            around = variants(question, rules_answer(question))
            smallest = min(around, key=lambda s: (s.block_i * s.block_j * s.block_l, s.num_stages))
            with hearing({question.key: smallest}):
                launches = call(arch)
            codes = compile_launches(launches, arch)
            found[f"{name} {question.rule}"] = [
                f"{code.error} {code.shared_memory <= code.shared_limit}" for code in codes
            ]
    return found


def test_variants_compile_for_every_target() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = "import json; from tests.test_tuning import compiled; print(json.dumps(compiled()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 2 * len(ARCHS)
    assert {said for codes in found.values() for said in codes} == {" True"}, found


# -- rules


def test_a_find_replaces_the_answer_to_its_facts_and_no_other() -> None:
    question, other = question_of(ask), ask(4096)
    before, number = ask(), tuning.state()
    find = variants(question, before)[0]
    tuning.learn({question.key: find})
    assert ask() == find != before
    assert ask(4096) == other
    assert rules_answer(question) == before
    assert tuning.known(question.key)
    assert tuning.state() > number
    number = tuning.state()
    tuning.forget()
    assert ask() == before
    assert not tuning.known(question.key)
    assert tuning.state() > number


def test_a_trial_is_its_threads_alone_and_ends_with_the_block() -> None:
    question, before = question_of(ask), ask()
    trial = variants(question, before)[0]
    elsewhere: list[Product] = []
    with hearing({question.key: trial}) as heard:
        thread = threading.Thread(target=lambda: elsewhere.append(ask()))
        thread.start()
        thread.join()
        assert ask() == trial
        assert list(heard.questions) == [question.key]
        with hearing() as inner:
            assert ask() == before
        assert ask() == trial
        assert list(inner.questions) == [question.key]
    assert elsewhere == [before]
    assert ask() == before


def test_outside_a_hearing_a_rule_is_its_remembered_answers() -> None:
    """No line of Python between the call and the look-up: the host cost of a call that was answered before."""
    from functools import _lru_cache_wrapper

    rule: Any = choose_forward
    kinds = [type(rule.__call__)]
    with hearing():
        kinds.append(type(rule.__call__))
    kinds.append(type(rule.__call__))
    assert [kind is _lru_cache_wrapper for kind in kinds] == [True, False, True]
    assert ask() is ask()


def test_a_rule_that_asks_another_is_one_question() -> None:
    """72 channels are no whole steps: the rule asks itself again, without descriptors."""
    question = question_of(
        lambda: choose_conv(
            64, 14, 14, 32, 72, 1, 1, 1, "bfloat16", "ieee", SM_90, vec=8, tma=True, along=True, whole=True, wide=False,
            stepped=False
        )
    )  # fmt: skip
    assert question.facts["tma"] is True
    assert not rules_answer(question).tma


def test_rules_have_names_of_their_own() -> None:
    def choose_sum(parts: int) -> Product:
        raise NotImplementedError

    with pytest.raises(ValueError, match="choose_sum"):
        tuning.rule(choose_sum)


def test_questions_and_variants_are_the_same_in_every_process() -> None:
    """Under other seeds of Python's hashes sets have another order, and objects other addresses."""
    code = (
        "from tribp.launch.arch import ARCHS; from tribp.launch.linear_sigmoid import choose_wgrad\n"
        "from tribp.launch.optim import choose_step; from tribp.launch.tuning import hearing, rules_answer\n"
        "from tribp.launch.variants import variants\n"
        "with hearing() as heard:\n"
        "    choose_step(5, frozenset(['float32', 'bfloat16', 'float16']), False, ARCHS['sm_90'])\n"
        "    choose_wgrad(80, 40, 48, 'float16', 'ieee', ARCHS['sm_90'], vec=8, tma=True, may_fuse=True, spare=1<<30)\n"
        "for key, question in heard.questions.items():\n"
        "    print(key, variants(question, rules_answer(question)))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in "123"
    }  # fmt: skip
    assert len(said) == 1
    assert "bfloat16', 'float16', 'float32'" in said.pop()


# -- what settings rest on


@pytest.mark.parametrize("machine", MACHINES)
def test_every_answer_says_what_it_rests_on(machine: str) -> None:
    found = {basis(rules_answer(question), MACHINES[machine]) for question in questions(MACHINES[machine]).values()}
    assert "derived" in found
    assert found <= {"derived", "compiled"}, "nothing has been measured yet"
    assert ("compiled" in found) == (machine != "interpreter")


@pytest.mark.parametrize(
    ("reason", "sm_90", "sm_86"),
    [
        ("derived: 16 bytes", "derived", "derived"),
        ("compiled: no spill", "compiled", "derived"),
        ("measured on sm_80, sm_90: 5 µs", "measured", "derived"),
        ("measured on sm_86: 5 µs", "derived", "measured"),
    ],
)
def test_a_basis_holds_where_it_was_found(reason: str, sm_90: str, sm_86: str) -> None:
    settings = Product(16, 16, 16, 4, 1, reason)
    assert basis(settings, SM_90) == sm_90
    assert basis(settings, Arch("cuda", 86, 84, 99 << 10, "sm_86")) == sm_86


@pytest.mark.parametrize("reason", ["", "128×128", "measured: 5 µs", "derived on sm_90: 1", "guessed: 1", "derived"])
def test_a_reason_must_say_so(reason: str) -> None:
    with pytest.raises(ValueError, match="begins with"):
        basis(Product(16, 16, 16, 4, 1, reason), SM_90)


# -- the search


def walk(times: Mapping[int, float], **more: Any) -> Any:
    """From 8, by steps of one."""
    return search(8, lambda n: [n - 1, n + 1], lambda n, _: times.get(n), **more)


def test_the_search_goes_on_from_the_fastest_neighbour() -> None:
    found = walk({8: 10.0, 7: 11.0, 9: 9.0, 10: 8.0, 11: 7.0, 12: 7.5})
    assert (found.settings, found.time, found.first_time) == (11, 7.0, 10.0)


def test_less_than_the_gain_is_chance() -> None:
    assert walk({8: 10.0, 9: 10.0 * (1 - GAIN / 2)}).settings == 8
    assert walk({8: 10.0, 9: 10.0 * (1 - 2 * GAIN)}).settings == 9


def test_what_was_fast_once_is_measured_again() -> None:
    found = search(8, lambda n: [9], lambda n, repetition: 5.0 if n == 9 and repetition == 0 else 10.0)
    assert found is not None
    assert (found.settings, found.time) == (8, 10.0)


def test_what_fails_the_second_time_is_not_kept() -> None:
    found = search(8, lambda n: [9], lambda n, again: 10.0 if n == 8 else None if again == 2 else 5.0)
    assert found is not None
    assert found.settings == 8


def test_what_cannot_be_measured_is_left_out() -> None:
    assert walk({8: 10.0, 9: 5.0}).settings == 9
    assert walk({9: 5.0}) is None


def test_a_search_ends_when_it_is_over() -> None:
    measured: list[int] = []

    def measure(n: int, _: int) -> float:
        measured.append(n)
        return 0.5**n

    found = search(8, lambda n: [n + 1], measure, lambda: len(measured) >= 4)
    assert found is not None
    assert set(measured) == {8, 9, 10, 11}
    assert found.settings == 11


# -- settings in files


@pytest.mark.parametrize("machine", MACHINES)
def test_settings_survive_json(machine: str) -> None:
    for question in questions(MACHINES[machine]).values():
        settings = rules_answer(question)
        assert tuning.decode(question.key, json.loads(json.dumps(tuning.encode(settings)))) == settings


@pytest.mark.parametrize(
    "change", [{"block": -1}, {"block": 1.5}, {"block": {}}, {"unknown": 1}, {"num_warps": ...}], ids=str
)
def test_what_is_no_settings_is_refused(change: dict[str, Any]) -> None:
    question = question_of(lambda: choose_sum(5, 5, SM_90))
    fields = {**tuning.encode(choose_sum(5, 5, SM_90)), **change}
    fields = {name: value for name, value in fields.items() if value is not ...}
    with pytest.raises(ValueError, match=r"settings|fields"):
        tuning.decode(question.key, fields)
    with pytest.raises(ValueError, match="no rule"):
        tuning.decode("choose_nothing()", fields)


def test_types_of_a_set_are_in_order() -> None:
    keys = {question_of(lambda t=t: choose_step(5, frozenset(t), False, SM_90)).key for t in ("ab", "ba")}  # type: ignore[misc]
    assert len(keys) == 1
