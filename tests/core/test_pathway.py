from __future__ import annotations

import pytest

from expertmix.core.pathway import Question
from expertmix.errors import ConfigError


@pytest.mark.parametrize(
    ("prompt", "options"),
    [((), ((1,),)), ((1,), ()), ((1,), ((),)), ((1,), ((2,), ())), ((-1,), ((2,),)),
     ((1,), ((2,), (3, -100)))],
)  # fmt: skip
def test_a_question_that_nobody_can_read_is_refused(prompt, options):
    """No prompt, no options, an empty one, or a padding label that would index from the end."""
    with pytest.raises(ConfigError, match="token"):
        Question(prompt, options)
