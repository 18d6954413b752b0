"""What a check found is said in English and in Chinese: the same figures, whatever the words."""

from __future__ import annotations

import re
from collections import Counter

from minipeft import ledger

FIGURE = re.compile(r"(?:(?<!\w)[+-])?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?:e[+-][0-9]+)?%?")


def figures(text: str) -> Counter[str]:
    """Its numbers as they are written, with their signs and %, and how often each is there."""
    return Counter(FIGURE.findall(text))


def says_the_same_in_chinese(verdict: ledger.Verdict | ledger.Evidence) -> bool:
    """Fails where the Chinese sentence is missing, is not Chinese, or has other figures than the English one."""
    assert re.search("[\u4e00-\u9fff].*。$", verdict.found_zh), verdict.found_zh
    assert figures(verdict.found_zh) == figures(verdict.found), f"{verdict.found}\n{verdict.found_zh}"
    return True
