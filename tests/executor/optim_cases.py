"""Random optimizer steps on the executed GPU beside torch's own loop, in the same type and in float64.

Numbers are judged by the checkout's own tests/optim_cases.py (`Trial`: torch's own error, and one unit in the last
place), and each part of what torch does not have (averages, clipping, a GradScaler's unscaling, wide states, stochastic
rounding) by a few lines here.
"""

import random
import traceback

import torch

SHAPES = [(67,), (1,), (3, 5), (2, 3, 2, 2), (1025,), (4, 3), (), (16, 64), (2050,)]


def run(cases: int, seed: int, report) -> bool:
    chance = random.Random(seed)
    passed = failed = 0
    for n in range(cases):
        case = chance.choice([base, base, beyond])
        seen = len(report.problems)
        title = "?"
        try:
            title = case(chance)
            why = "; ".join(map(str, report.problems[seen:]))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            why = f"{type(error).__name__}: {str(error)[:300]} ({where.name}:{where.lineno}) {getattr(error, 'title', '')}"
        if why:
            failed += 1
            print("FAIL", n, title, "|", why, flush=True)
        else:
            passed += 1
    print(f"{passed} passed, {failed} failed")
    return bool(failed)


def laid_out(chance, values, layouts):
    """The values in a layout that suits their shape."""
    from tests import optim_cases as c

    suitable = [c.plain, c.plain, c.shifted]
    if values.dim() >= 1 and values.numel():
        suitable += [c.gaps]
    if values.dim() == 2:
        suitable += [c.transposed]
    if values.dim() == 4:
        suitable += [c.channels_last, c.permuted]
    chosen = chance.choice(suitable) if layouts else c.plain
    return chosen(values), chosen


def base(chance) -> str:
    from tests import optim_cases as c

    name, own = chance.choice(c.VARIANTS)
    dtype = chance.choice(c.DTYPES)
    layouts = chance.random() < 0.7
    groups, gradients = [], []
    for _ in range(chance.choice([1, 2, 3])):
        common = c.COMMON[chance.randrange(len(c.COMMON))]
        params = []
        for k in range(chance.choice([1, 2, 4])):
            shape = chance.choice(SHAPES)
            p, _ = laid_out(chance, c.values(shape, dtype, chance.randrange(1000), k), layouts)
            params.append(p)
            gradients.append(shape)
        groups.append((c.common(name, *common), params))
    title = f"{name} {own} {dtype} {[len(p) for _, p in groups]} layouts={layouts}"
    try:
        trial = c.Trial(name, own, groups)
        for _ in range(3):
            trial.step([
                None if chance.random() < 0.1 else laid_out(chance, c.values(shape, dtype, chance.randrange(10000), k), layouts)[0]
                for k, shape in enumerate(gradients)
            ])  # fmt: skip
        trial.check()
    except Exception as error:
        error.title = title
        raise
    return title


def beyond(chance) -> str:
    """Adam with what torch does not have, against the same formulas in float64."""
    import tribp.optim
    from tests import optim_cases as c

    dtype = chance.choice([torch.bfloat16, torch.float16, torch.float32, torch.float64])
    clip = chance.choice([None, 0.5, 1e3])
    average = chance.choice([None, 0.9])
    scale = chance.choice([None, 8.0])
    rounding = dtype == torch.bfloat16 and chance.random() < 0.5
    inside = chance.random() < 0.3
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) and chance.random() < 0.5 else None
    title = (
        f"Adam {dtype} clip={clip} ema={average} scale={scale} stochastic={rounding} eps_inside={inside} states={wide}"
    )
    shapes = [chance.choice(SHAPES) for _ in range(3)]
    params = [laid_out(chance, c.values(s, dtype, 1, k), True)[0] for k, s in enumerate(shapes)]
    options = dict(lr=0.1, eps=1e-2, betas=(0.9, 0.99))
    if clip is not None:
        options["max_grad_norm"] = clip
    if average is not None:
        options["ema_decay"] = average
    if rounding:
        options["stochastic_rounding"] = True
    if inside:
        options["eps_inside_sqrt"] = True
    if wide is not None:
        options["state_dtype"] = wide
    try:
        optimizer = tribp.optim.Adam(params, fused=True, **options)
        exact = [p.detach().double().clone() for p in params]
        m, v = ([torch.zeros_like(p) for p in exact] for _ in range(2))
        emas = [None] * 3
        units = 0
        for t in range(1, 4):
            grads = [c.values(s, dtype, 10 + t, k) for k, s in enumerate(shapes)]
            for p, g in zip(params, grads):
                p.grad = laid_out(chance, g * scale if scale else g, True)[0]
            before = [p.detach().double().clone() for p in params]
            skip = scale is not None and t == 2 and chance.random() < 0.5
            if scale is not None:
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(float(skip))
            optimizer.step()
            if scale is not None:
                del optimizer.grad_scale, optimizer.found_inf
            if skip:
                assert all(torch.equal(p.detach().double(), b) for p, b in zip(params, before)), (
                    "a skipped step changed something"
                )
                optimizer_steps = t - 1
                break
            optimizer_steps = t
            given = [p.grad.detach().double() if scale else g.double() for p, g in zip(params, grads)]
            if scale:
                for p, g in zip(params, grads):
                    assert torch.allclose(p.grad.double(), (g * scale).double() / scale, rtol=1e-2, atol=1e-7), (
                        "unscaled gradient"
                    )
            norm = torch.sqrt(sum(g.square().sum() for g in given))
            if clip is not None:
                assert abs(float(optimizer.grad_norm) - float(norm)) <= 1e-5 * float(norm) + 1e-12, (
                    f"norm {float(optimizer.grad_norm)} {float(norm)}"
                )
            factor = min(1.0, clip / (float(norm) + 1e-6)) if clip is not None else 1.0
            for k, g in enumerate(given):
                g = g * factor
                m[k] = m[k] + 0.1 * (g - m[k])
                v[k] = 0.99 * v[k] + 0.01 * g * g
                mh, vh = m[k] / (1 - 0.9**t), v[k] / (1 - 0.99**t)
                d = (vh + 1e-2).sqrt() if inside else vh.sqrt() + 1e-2
                exact[k] = exact[k] - 0.1 * mh / d
                units += 1
                if average is not None:
                    x = params[k].detach().double()
                    emas[k] = x.clone() if emas[k] is None else 0.9 * emas[k] + 0.1 * x
        eps = torch.finfo(dtype).eps
        narrow = wide is None and dtype in (torch.bfloat16, torch.float16)
        bound = {torch.float64: 1e-12}.get(dtype, (20 if narrow else 6) * eps)
        for k, p in enumerate(params):
            off = (p.detach().double() - exact[k]).abs().max() if p.numel() else 0.0
            assert float(off) <= bound * max(1.0, float(exact[k].abs().max()) if p.numel() else 1.0), (
                f"parameter {k} off by {float(off):.2e}"
            )
            step = float(optimizer.state[p]["step"])
            assert step == optimizer_steps, f"step {step}, not {optimizer_steps}"
            if average is not None and emas[k] is not None and p.numel():
                assert torch.allclose(optimizer.state[p]["ema"].double(), emas[k], rtol=1e-5, atol=1e-5), "average"
    except Exception as error:
        error.title = title
        raise
    return title
