"""Is a generated answer right? One function per kind of answer, each `(example, text) -> bool`.

`text` is what the model generated after the prompt, without the end-of-sequence token.
"""

import re
from decimal import Decimal

from cllm_jax.tasks.example import Example

# What models write for a space between thousands, a minus and a plus sign.
_PLAIN = str.maketrans(dict.fromkeys('\u00a0\u2007\u2009\u202f', ' ') | {'\uff0b': '+'})
_PLAIN |= str.maketrans(dict.fromkeys('\u2010\u2011\u2012\u2013\u2212\uff0d', '-'))
# Possessive: text that a model repeats without end is read once.
_BEFORE = r'(?:\\boxed|[ \t*_`$€£¥₹~≈=:(\[{\\"\']|<<[^<>\n]*>>)*+'
_GROUPED = r'[0-9]{1,3}(?:(?:[ ,]|\\,|\{,\})[0-9]{3})++(?![0-9])'
_NUMBER = rf'((?:{_GROUPED}|[0-9][0-9,]*+)(?:\.[0-9]++)?+|\.[0-9]++)'
_MARKED = re.compile(rf'####{_BEFORE}([-+]?){_BEFORE}{_NUMBER}')
# What makes the number a part of another: '72/3', '5½', '5 1/2', '7:30', '1.2.3', '10²', '1e3'.
_GOES_ON = re.compile(
    r'[-+*^:._\u00d7\u00f7]?[0-9¹²³¼½¾⅓⅔]|[eE][-+]?[0-9]|[ \t]*+[/\u2044][ \t]*+[0-9]'
    r'|[ \t](?:[0-9]++[/\u2044][0-9]|[¼½¾⅓⅔])'
)
_SQL_TOKEN = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|\w+|[^\w\s]""")


def final_number(text: str) -> Decimal | None:
    """The number after the first `####` that has one, or None where there is none.

    This is GSM8K's own rule (openai/grade-school-math), so neither a unit nor text that runs on
    counts. Beyond it: signs, currencies, markup and `\\boxed` before the number, commas or spaces
    between its thousands; and a number that is a part of another, as of a fraction or a time of
    day, gives None, where that rule would read the part.
    """
    text = text.translate(_PLAIN)
    if not (found := _MARKED.search(text)) or _GOES_ON.match(text, found.end()):
        return None
    return Decimal(found[1] + re.sub(r'[^0-9.]', '', found[2]))


def same_number(example: Example, text: str) -> bool:
    """Do the reference answer and `text` give the same `#### N`, by the rule of `final_number`?

    Numbers are compared as exact decimals: 72, 72.0 and 72.00 are one number. This is GSM8K's
    test@1; the steps before `####` and all that comes after the number are not judged.
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
