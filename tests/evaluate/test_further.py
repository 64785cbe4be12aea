from __future__ import annotations

import pytest

from fastgessl.config import UsageError
from fastgessl.evaluate.further import require_one_process
from fastgessl.evaluate.tasks import FEATURE_TASKS, IMAGE_TASKS


@pytest.mark.parametrize("task", IMAGE_TASKS)
def test_what_trains_is_refused_on_several_processes_before_any_work(task):
    require_one_process((*FEATURE_TASKS, task), processes=1)
    require_one_process(FEATURE_TASKS, processes=4)
    with pytest.raises(UsageError, match=f"Task {task} trains on one process"):
        require_one_process((*FEATURE_TASKS, task), processes=2)
