"""What did the paper's author measure? Errors over that of predicting zero, ReLU experts, d = 256.

From the executed notebook `old/moe_test.ipynb` and `my_distilling_code/moe_student_teacher.py` of
github.com/eboix/secret_moe at commit e7b43627b8024d41007ae0a0986841b9fd5b7e37, whose figures are
granularity_separation1.pdf and 2.pdf of arXiv 2505.06839. Each is one training: the lower of two
learning rates (1e-3 and 1e-2), and the least after an epoch.
"""

from __future__ import annotations

SOURCE = "github.com/eboix/secret_moe at e7b43627, old/moe_test.ipynb (arXiv 2505.06839)"

TOP_KS = (2, 4, 6, 8, 10, 12, 14, 16)
"""Of teachers and of students; of twice as many experts."""

GRID = (
    (2.3e-4, 0.19, 0.21, 0.22, 0.22, 0.22, 0.23, 0.23),
    (1.5e-6, 3.7e-7, 0.12, 0.17, 0.19, 0.20, 0.20, 0.22),
    (2.6e-4, 0.041, 4.7e-7, 0.090, 0.13, 0.17, 0.17, 0.19),
    (1.6e-4, 1.2e-4, 0.021, 4.4e-5, 0.070, 0.12, 0.14, 0.16),
    (2.2e-4, 0.011, 0.032, 0.018, 9.4e-5, 0.057, 0.093, 0.13),
    (1.5e-4, 4.7e-5, 6.7e-5, 0.037, 0.013, 2.2e-4, 0.052, 0.086),
    (1.3e-4, 0.0069, 0.0076, 0.029, 0.032, 0.016, 0.0030, 0.045),
    (0.0014, 1.2e-4, 0.010, 1.7e-4, 0.032, 0.028, 0.0091, 0.0034),
)
"""A row a student, a column a teacher, both by `TOP_KS`: m = 2k, 320 and 256 active neurons."""

SWEEP_TOP_KS = (2, 4, 6, 8)
SWEEP_FACTORS = (1, 2, 4, 8, 16)
SWEEP = (
    (0.238, 0.207, 0.208, 0.200, 0.188),
    (0.176, 0.124, 0.127, 0.124, 0.126),
    (0.115, 0.066, 0.065, 0.068, 0.067),
    (0.0035, 0.0041, 0.017, 0.017, 0.0096),
)
"""Teacher 16e8a; a row a student's k, a column how many times its 2k experts it has.

Students' routers have a bias here.
"""


def of_grid(student: int, teacher: int) -> float | None:
    """The author's error for these two k, m = 2k each; None: not measured."""
    if student not in TOP_KS or teacher not in TOP_KS:
        return None
    return GRID[TOP_KS.index(student)][TOP_KS.index(teacher)]


def of_sweep(top_k: int, factor: int) -> float | None:
    """The author's error of a student with so many times its 2k experts; None: not measured."""
    if top_k not in SWEEP_TOP_KS or factor not in SWEEP_FACTORS:
        return None
    return SWEEP[SWEEP_TOP_KS.index(top_k)][SWEEP_FACTORS.index(factor)]
