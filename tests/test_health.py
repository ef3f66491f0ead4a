import pytest

from workbench.health import FIRST_JUDGED, Watch

HEALTHY = [1.0 + 0.5 * (step % 5) for step in range(100)]


def watched(norms: list[float], loss: float = 1.0) -> Watch:
    watch = Watch()
    for step, norm in enumerate(norms, 1):
        watch.step(step, loss, norm)
    return watch


def said(capsys: pytest.CaptureFixture) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_a_healthy_run_is_not_commented(capsys: pytest.CaptureFixture) -> None:
    watch = watched([*HEALTHY, 19.9, 1.1e-6])  # the median is 2
    watch.validation(100, 9.9)
    assert said(capsys) == []


def test_a_vanishing_gradient_is_said_once(capsys: pytest.CaptureFixture) -> None:
    watched([1.0, 1e-6, 9e-7, 1e-8, 0.0])
    assert said(capsys) == ["warning: step 3: gradient norm 9.0e-07 is below 1e-06 (vanishing)"]


def test_an_exploding_gradient_is_said_once(capsys: pytest.CaptureFixture) -> None:
    watched([*HEALTHY, 21.0, 500.0])
    assert said(capsys) == ["warning: step 101: gradient norm 21 is 10 times its median of 2 (exploding)"]


def test_the_first_steps_are_not_judged(capsys: pytest.CaptureFixture) -> None:
    watched([1.0] * (FIRST_JUDGED - 1) + [100.0])
    assert said(capsys) == []
    watched([1.0] * FIRST_JUDGED + [100.0])
    assert said(capsys) == [
        f"warning: step {FIRST_JUDGED + 1}: gradient norm 100 is 100 times its median of 1 (exploding)"
    ]


def test_the_median_is_of_recent_steps(capsys: pytest.CaptureFixture) -> None:
    watched([100.0] * 300 + [1.0] * 150 + [50.0])
    assert len(said(capsys)) == 1


def test_a_gradient_that_comes_back_from_nothing_has_not_exploded(capsys: pytest.CaptureFixture) -> None:
    watched([0.0] * 100 + [1.0] * 5)
    assert said(capsys) == ["warning: step 1: gradient norm 0.0e+00 is below 1e-06 (vanishing)"]


def test_over_fitting_is_said_once(capsys: pytest.CaptureFixture) -> None:
    watch = watched(HEALTHY, loss=0.5)
    watch.validation(100, 5.0)
    assert said(capsys) == []
    for _ in range(2):
        watch.validation(100, 6.0)
    assert said(capsys) == [
        "warning: step 100: validation loss 6 is 12 times the recent training loss of 0.5 (over-fitting)"
    ]


def test_a_validation_without_a_number_is_said_once(capsys: pytest.CaptureFixture) -> None:
    watch = watched(HEALTHY)
    for _ in range(2):
        watch.validation(100, float("nan"))
    assert said(capsys) == ["warning: step 100: validation loss nan is not finite"]


@pytest.mark.parametrize("loss", [0.0, -1.0])
def test_a_loss_that_is_not_positive_has_no_multiple(loss: float, capsys: pytest.CaptureFixture) -> None:
    watched(HEALTHY, loss=loss).validation(100, 50.0)
    assert said(capsys) == []


def test_validation_before_any_step_of_this_process(capsys: pytest.CaptureFixture) -> None:
    """A resumed run may begin with the validation that the kill took away."""
    Watch().validation(3, 1e9)
    assert said(capsys) == []


def test_the_recent_training_loss_forgets(capsys: pytest.CaptureFixture) -> None:
    watch = watched([1.0] * 50, loss=100.0)
    for step in range(50, 150):
        watch.step(step, 1.0, 1.0)
    watch.validation(150, 11.0)
    assert len(said(capsys)) == 1, "11 is not ten times 100, but more than ten times 1"


def test_each_kind_is_said_for_itself(capsys: pytest.CaptureFixture) -> None:
    watch = watched([*HEALTHY, 1e-9, 1e3])
    watch.validation(102, 1e3)
    assert [line.rpartition("(")[2] for line in said(capsys)] == ["vanishing)", "exploding)", "over-fitting)"]
