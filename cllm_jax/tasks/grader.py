"""Is a generated answer right? One function per kind of answer, each `(example, text) -> bool`.

`text` is what the model generated after the prompt, without the end-of-sequence token.
"""

import re
from decimal import Decimal

from cllm_jax.tasks.example import Example

# The whole line must be the number: '#### 72 clips' or '#### 72/3' is not an answer.
_FINAL_NUMBER = re.compile(r'^#### *(-?)\$?([0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)[.%]?[ \t]*$', re.M)
_SQL_TOKEN = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|\w+|[^\w\s]""")


def final_number(text: str) -> Decimal | None:
    """The number of the last line of the form `#### N`, or None if there is no such line.

    Thousands commas, a dollar or percent sign and a final full stop are allowed and ignored.
    """
    found = _FINAL_NUMBER.findall(text.replace('\r', ''))
    return Decimal(''.join(found[-1]).replace(',', '')) if found else None


def same_number(example: Example, text: str) -> bool:
    """Do the `#### N` lines of the reference answer and of `text` give the same number?

    Numbers are compared as exact decimals: 72, 72.0 and 72.00 are one number. This is GSM8K's
    test@1; the steps before the last line are not judged.
    """
    expected = final_number(example.answer)
    return expected is not None and final_number(text) == expected


def same_text(example: Example, text: str) -> bool:
    """Is `text` the reference answer, up to white space? False where there is no reference."""
    return bool(example.answer.strip()) and text.split() == example.answer.split()


def sql_tokens(query: str) -> list[str]:
    """The query in the form in which `same_sql` compares: quoted parts verbatim, the rest folded.

    White space between tokens, the case of keywords and names (SQL ignores both) and closing
    semicolons do not matter. Anything else, such as the order of conditions, does.
    """
    tokens = [t if t[0] in '\'"' else t.casefold() for t in _SQL_TOKEN.findall(query)]
    while tokens and tokens[-1] == ';':
        tokens.pop()
    return tokens


def same_sql(example: Example, text: str) -> bool:
    """Is `text` the reference query up to white space, case outside quotes and a semicolon?

    This is stricter than to execute both: a right query that is written otherwise counts as wrong.
    """
    return bool(example.answer.strip()) and sql_tokens(text) == sql_tokens(example.answer)
