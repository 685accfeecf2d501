"""The numbers of a step: t, the step size h = lr sqrt(1 - b2^t) / (1 - b1^t), and the decay lr wd.

Where the host knows lr and t, it computes all three and each launch is given them. Where either is on the device,
``step_kernel`` writes them there once a step, and each launch is given their address.
"""

import triton
import triton.language as tl


@triton.jit
def current_step(step, p_step):
    """t (1, 2, ...): ``step`` from the host or, if ``p_step`` is given, the float32 at that address."""
    if p_step is None:
        return step
    else:
        return tl.load(p_step).to(tl.int32)


@triton.jit
def step_numbers(step, step_size, decay, p_step):
    """t, h and the decay: from the host or, if ``p_step`` is given, the three float32 at that address."""
    if p_step is None:
        return step, step_size, decay
    else:
        return current_step(step, p_step), tl.load(p_step + 1), tl.load(p_step + 2)


@triton.jit(do_not_specialize=["step"])
def step_kernel(p_numbers, step, p_step, lr, p_lr, correction, log_beta1, log_beta2, weight_decay):
    """Write t, h and the decay, float32 ``[3]``. One program.

    ``correction`` is h / lr if the host knows t. On the device it is computed, with 1 - b^t = -expm1(t log b), because
    1 - 0.999 would lose 14 bits. ``log_beta1`` = 0 means no correction.
    """
    t = current_step(step, p_step)
    if p_lr is not None:
        lr = tl.load(p_lr)
    if p_step is not None:
        if log_beta1 < 0:
            correction = tl.sqrt(-expm1(t * log_beta2)) / -expm1(t * log_beta1)
    tl.store(p_numbers, t.to(tl.float32))
    tl.store(p_numbers + 1, lr * correction)
    tl.store(p_numbers + 2, lr * weight_decay)


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0, to float32 rounding. (e - 1) x / log(e) corrects for the error of e (Kahan)."""
    e = tl.exp(x)
    near = tl.where(e == 1.0, 0.5, e)
    return tl.where(e == 1.0, x, tl.where(e < 1e-30, -1.0, (near - 1.0) * x / tl.log(tl.where(e < 1e-30, 0.5, near))))
