"""Every launch setting that autotuning would try, one at a time, on the executed GPU, against float64."""

import torch
import torch.nn.functional as F

from .run import executed


def _error(result, exact) -> float:
    return float((result.detach().double() - exact.detach()).norm() / exact.detach().norm().clamp_min(1e-300))


def run(function, inputs, exact_gradients, target: str, bound: float, most: int, **settings) -> tuple[int, int]:
    """function(*inputs) → y; exact_gradients(inputs, dy, y) → (y, *gradients) in float64. Tries `most` of each rule's."""
    from tribp.kernels.launch_tuning import hearing, rules_answer
    from tribp.kernels.launch_variants import variants

    def once(told):
        with executed(target, **settings) as report, hearing(told) as heard:
            y = function(*inputs)
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
            if y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last):
                dy = dy.contiguous(memory_format=torch.channels_last)
            gradients = torch.autograd.grad(y, inputs, dy)
        exact = exact_gradients(inputs, dy, y)
        worst = max(_error(a, e) for a, e in zip((y, *gradients), exact))
        return heard, worst, report

    heard, worst, report = once({})
    print(f"the rules' choice: error {worst:.1e}, problems {list(map(str, report.problems))}", flush=True)
    passed = failed = 0
    for key, question in heard.questions.items():
        for other in variants(question, rules_answer(question))[:most]:
            try:
                _, worst, report = once({key: other})
                wrong = worst > bound or bool(report.problems)
                why = f"error {worst:.1e} {list(map(str, report.problems))}"
            except Exception as error:
                wrong, why = True, f"{type(error).__name__}: {str(error)[:200]}"
            passed, failed = passed + (not wrong), failed + wrong
            if wrong:
                print("FAIL", question.rule, other, why, flush=True)
    print(f"{passed} passed, {failed} failed", flush=True)
    return passed, failed


def linear(m, k, n, dtype, target, most=100, **settings):
    g = torch.Generator().manual_seed(0)
    make = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).to(dtype)
    inputs = [t.requires_grad_() for t in (make(m, k), (make(n, k) / k**0.5).to(dtype), make(n))]

    def exact(inputs, dy, y):
        x, w, b = (t.detach().double() for t in inputs)
        kept = y.detach().double()
        dz = dy.double() * kept * (1 - kept)
        return torch.sigmoid(x @ w.t() + b), dz @ w, dz.t() @ x, dz.sum(0)

    import tribp

    return run(
        tribp.linear_sigmoid,
        inputs,
        exact,
        target,
        3 * torch.finfo(dtype).eps + 1e-6 * (dtype == torch.float32),
        most,
        **settings,
    )


def conv(size, out, groups, stride, last, dtype, target, most=100, activation="sigmoid", **settings):
    import tribp

    g = torch.Generator().manual_seed(0)
    make = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).to(dtype)
    x, w, b = make(*size), make(out, size[1] // groups, 3, 3), make(out)
    w = (w / (9 * size[1] / groups) ** 0.5).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    inputs = [t.requires_grad_() for t in (x, w, b)]

    def exact(inputs, dy, y):
        x, w, b = (t.detach().double().requires_grad_() for t in inputs)
        z = F.conv2d(x, w, b, stride=stride, padding=1, groups=groups)
        kept = y.detach().double()
        dz = dy.double() * (kept * (1 - kept) if activation else 1)
        return (torch.sigmoid(z) if activation else z), *torch.autograd.grad(z, (x, w, b), dz)

    def function(x, w, b):
        return tribp.conv3x3(x, w, b, stride=stride, padding=1, groups=groups, activation=activation)

    return run(
        function, inputs, exact, target, 3 * torch.finfo(dtype).eps + 1e-6 * (dtype == torch.float32), most, **settings
    )
