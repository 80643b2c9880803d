"""What Triton compiles for sm_80, executed without a GPU: every kernel (`tests.py`)."""

from .tests import (  # noqa: F401
    gpu,
    pytest_generate_tests,
    test_case,
    test_every_form_was_executed,
    test_every_setting_that_tuning_tries,
    test_other_events,
    test_random_case,
)

TARGET = "sm_80"
