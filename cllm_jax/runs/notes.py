"""What was found out about this machine once, and need not be found out again.

A note is a small JSON file under the user's cache directory, named after what it hangs on. One that
is lost or damaged is as good as none.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cllm_jax.runs.atomic import write_json


def _path(kind: str, facts: Mapping[str, Any]) -> Path:
    cache = Path(os.environ.get('XDG_CACHE_HOME', ''))
    if not cache.is_absolute():  # to be ignored, says the XDG specification
        cache = Path.home() / '.cache'
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return cache / 'cllm_jax' / f'{kind}-{name}.json'


def read_note(kind: str, facts: Mapping[str, Any]) -> Any:
    """What was noted of a kind under these facts; None if nothing was."""
    try:
        path = _path(kind, facts)
        found = json.loads(path.read_text()) if path.is_file() else {}  # a pipe would be waited for
        return found['value'] if found['facts'] == dict(facts) else None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # no home
        return None


def write_note(kind: str, facts: Mapping[str, Any], value: Any) -> Path | None:
    """Keep a value that JSON can hold; its file, or None where none can be written."""
    try:
        path = _path(kind, facts)
        write_json(path, {'facts': dict(facts), 'value': value})
    except (OSError, RuntimeError):
        return None
    return path
