"""The prompt templates: how a question of each dataset is put to the model.

Every function returns text that ends exactly where the answer begins, so `prompt + answer` is the
training text. The GSM8K template is the one of CLLM (arXiv 2403.00835). That paper's wording for
Spider is known only in part; where a docstring says "our wording", the form is the paper's and the
sentence is ours.
"""

from collections.abc import Iterable, Sequence


def gsm8k(question: str) -> str:
    """CLLM's GSM8K prompt, word for word; the answer starts on its own line."""
    return f"Question:\n{question}\nAnswer:\nLet's think step by step.\n"


def instruction(request: str) -> str:
    """The instruction/response wrapper CLLM uses for its code datasets (Spider, CodeSearchNet)."""
    return f'### Instruction:\n{request}\n### Response:\n'


def spider(question: str, tables: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Spider's prompt: translate a question to SQL, given `(table, columns)` pairs.

    The form (request, tables with their columns, question, in the instruction wrapper) is CLLM's;
    the sentence is our wording.
    """
    schema = '; '.join(f'{table} ({", ".join(columns)})' for table, columns in tables)
    return instruction(
        'Translate the following question into one SQL query. '
        f'The database has these tables, each with its columns: {schema}.\n'
        f'Question: {question}'
    )


def codesearchnet(docstring: str) -> str:
    """CLLM's CodeSearchNet prompt: write the function that a docstring describes."""
    return instruction(f'Please generate code based on the following doc:\n{docstring}')


def vicuna(message: str) -> str:
    """One user turn in the style of Vicuna, without its system sentence; answers start with ' '."""
    return f'USER: {message} ASSISTANT:'


def wikisql(question: str, columns: Iterable[str]) -> str:
    """WikiSQL's prompt, kept short for small models; our wording. Answers start with ' '.

    Column names stand in double quotes as in the SQL; a double quote in a name is doubled.
    """
    quoted = ', '.join('"' + column.replace('"', '""') + '"' for column in columns)
    return f'columns: {quoted}\nquestion: {question}\nSQL:'
