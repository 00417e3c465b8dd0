"""Triton kernels that read a tile of logits once for its statistics and once for its gradient.

One program a row. ``statistics_kernel`` keeps running maxima and rescales its sums as they grow, with the formulas that
combine ranks; ``divergence_kernel`` sums value and slope of a divergence that needs normalised log-probabilities;
``gradient_kernel`` replaces the student's logits by their gradient. Shapes as in the package: student [n, R], teacher
[n, common columns], row statistics [n] fp32. No collectives. ``TRITON_INTERPRET=1`` runs them on CPU.
"""

import triton
import triton.language as tl

FORWARD_REVERSE_KL = tl.constexpr(0)  # first * forward KL + second * reverse KL
JSD = tl.constexpr(1)  # first = beta
SKEW_FORWARD_KL = tl.constexpr(2)  # first = alpha
SKEW_REVERSE_KL = tl.constexpr(3)  # first = alpha
TVD = tl.constexpr(4)
LOWEST = tl.constexpr(-1.0e30)
STATISTICS = 9  # rows that statistics_kernel writes, in this order: m_lm, Z_lm, m_s, Z_s, m_t, Z_t, and of e_t y,
#                 e_t (y - x), e_s (x - y) the sums, with x, y relative to the maxima


@triton.jit
def _log_mixture(log_a, weight_a, log_b, weight_b):
    a = tl.where(weight_a > 0, log_a + tl.log(tl.maximum(weight_a, 1e-30)), LOWEST)
    b = tl.where(weight_b > 0, log_b + tl.log(tl.maximum(weight_b, 1e-30)), LOWEST)
    largest = tl.maximum(a, b)
    return largest + tl.log(tl.exp(a - largest) + tl.exp(b - largest))


@triton.jit
def _value_and_slope(log_p, log_q, first, second, KIND: tl.constexpr):
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    if KIND == FORWARD_REVERSE_KL:
        reverse = q * (log_q - log_p)
        value = second * reverse + first * p * (log_p - log_q)
        slope = second * reverse - first * p
    elif KIND == JSD:
        log_m = _log_mixture(log_p, first, log_q, 1 - first)
        slope = (1 - first) * q * (log_q - log_m)
        value = first * p * (log_p - log_m) + slope
    elif KIND == SKEW_FORWARD_KL:
        log_m = _log_mixture(log_p, first, log_q, 1 - first)
        value = p * (log_p - log_m)
        slope = (first - 1) * tl.exp(log_p + log_q - log_m)
    elif KIND == SKEW_REVERSE_KL:
        log_ratio = log_q - _log_mixture(log_q, first, log_p, 1 - first)
        value = q * log_ratio
        slope = q * (log_ratio - tl.where(first > 0, first * tl.exp(tl.where(first > 0, log_ratio, 0.0)), 0.0))
    else:
        value = 0.5 * tl.abs(p - q)
        slope = tl.where(q > p, 0.5 * q, tl.where(q < p, -0.5 * q, 0.0))
    return value, slope


@triton.jit
def statistics_kernel(
    student, teacher, out, n, student_stride, teacher_stride, columns, common, inverse_temperature,
    HAS_TEACHER: tl.constexpr, SEPARATE_LM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    m_s = LOWEST * 1.0
    z_s = 0.0
    m_t = LOWEST * 1.0
    z_t = 0.0
    teacher_dot = 0.0
    forward = 0.0
    reverse = 0.0
    for start in range(0, common, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < common
        x = tl.load(student + offsets, mask=inside, other=LOWEST).to(tl.float32) * inverse_temperature
        new_s = tl.maximum(m_s, tl.max(x, axis=0))
        shift_s = m_s - new_s
        x = tl.where(inside, x - new_s, 0.0)
        e_s = tl.where(inside, tl.exp(x), 0.0)
        if HAS_TEACHER:
            y = tl.load(teacher + row * teacher_stride + offsets, mask=inside, other=LOWEST).to(tl.float32)
            y = y * inverse_temperature
            new_t = tl.maximum(m_t, tl.max(y, axis=0))
            shift_t = m_t - new_t
            y = tl.where(inside, y - new_t, 0.0)
            e_t = tl.where(inside, tl.exp(y), 0.0)
            forward = tl.exp(shift_t) * (forward + z_t * (shift_t - shift_s)) + tl.sum(e_t * (y - x), axis=0)
            reverse = tl.exp(shift_s) * (reverse + z_s * (shift_s - shift_t)) + tl.sum(e_s * (x - y), axis=0)
            teacher_dot = tl.exp(shift_t) * (teacher_dot + z_t * shift_t) + tl.sum(e_t * y, axis=0)
            z_t = tl.exp(shift_t) * z_t + tl.sum(e_t, axis=0)
            m_t = new_t
        z_s = tl.exp(shift_s) * z_s + tl.sum(e_s, axis=0)
        m_s = new_s
    m_lm = m_s
    z_lm = z_s
    if SEPARATE_LM:
        m_lm = LOWEST * 1.0
        z_lm = 0.0
        for start in range(0, columns, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            inside = offsets < columns
            x = tl.load(student + offsets, mask=inside, other=LOWEST).to(tl.float32)
            new = tl.maximum(m_lm, tl.max(x, axis=0))
            z_lm = tl.exp(m_lm - new) * z_lm + tl.sum(tl.where(inside, tl.exp(x - new), 0.0), axis=0)
            m_lm = new
    out += row
    tl.store(out, m_lm)
    tl.store(out + n, z_lm)
    tl.store(out + 2 * n, m_s)
    tl.store(out + 3 * n, z_s)
    if HAS_TEACHER:
        tl.store(out + 4 * n, m_t)
        tl.store(out + 5 * n, z_t)
        tl.store(out + 6 * n, teacher_dot)
        tl.store(out + 7 * n, forward)
        tl.store(out + 8 * n, reverse)


@triton.jit
def divergence_kernel(
    student, teacher, log_z_s, log_z_t, out, n, student_stride, teacher_stride, common, inverse_temperature, first,
    second, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    log_s = tl.load(log_z_s + row)
    log_t = tl.load(log_z_t + row)
    value_sum = 0.0
    slope_sum = 0.0
    for start in range(0, common, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < common
        x = tl.load(student + row * student_stride + offsets, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(teacher + row * teacher_stride + offsets, mask=inside, other=0.0).to(tl.float32)
        value, slope = _value_and_slope(
            y * inverse_temperature - log_t, x * inverse_temperature - log_s, first, second, KIND
        )
        value_sum += tl.sum(tl.where(inside, value, 0.0), axis=0)
        slope_sum += tl.sum(tl.where(inside, slope, 0.0), axis=0)
    tl.store(out + row, value_sum)
    tl.store(out + n + row, slope_sum)


@triton.jit
def gradient_kernel(
    student, teacher, log_z_lm, log_z_s, log_z_t, slope_sums, lm_weights, kd_weights, label_columns, student_stride,
    teacher_stride, columns, common, inverse_temperature, inverse_softcap, first, second,
    HAS_TEACHER: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    log_lm = tl.load(log_z_lm + row)
    lm = tl.load(lm_weights + row)
    label = tl.load(label_columns + row)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < columns
        z = tl.load(student + offsets, mask=inside, other=0.0).to(tl.float32)
        gradient = lm * (tl.exp(z - log_lm) - tl.where(offsets == label, 1.0, 0.0))
        if HAS_TEACHER:
            shared = offsets < common
            y = tl.load(teacher + row * teacher_stride + offsets, mask=shared, other=0.0).to(tl.float32)
            log_p = y * inverse_temperature - tl.load(log_z_t + row)
            log_q = z * inverse_temperature - tl.load(log_z_s + row)
            _, slope = _value_and_slope(log_p, log_q, first, second, KIND)
            kd = slope - tl.exp(log_q) * tl.load(slope_sums + row)
            gradient += tl.where(shared, tl.load(kd_weights + row) * kd, 0.0)
        gradient *= 1.0 - (z * inverse_softcap) * (z * inverse_softcap)  # inverse_softcap is 0 without a softcap
        tl.store(student + offsets, gradient, mask=inside)
