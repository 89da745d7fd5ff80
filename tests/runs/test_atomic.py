"""Files are replaced at once, and what is not a file is written to."""

import os
import subprocess
import sys

from cllm_jax.runs.atomic import write_atomic


def test_a_pipe_and_a_link_are_written_to_and_not_replaced(tmp_path):
    pipe, link, file = (tmp_path / name for name in ('pipe', 'link', 'file'))
    os.mkfifo(pipe)
    link.symlink_to(file)
    write_atomic(link, b'text')
    assert link.is_symlink() and file.read_bytes() == b'text'
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomic(pipe, b'text')
    assert pipe.is_fifo() and os.read(reader, 9) == b'text'
    os.close(reader)


def test_a_file_to_which_is_printed_is_written_to_and_not_replaced(tmp_path):
    file = tmp_path / 'file'
    program = (
        'from pathlib import Path; from cllm_jax.runs.atomic import write_atomic\n'
        "print('printed'); write_atomic(Path('/dev/stdout'), b'written'); print(' after')"
    )
    file.write_text('before ')
    with open(file, 'a') as out:
        subprocess.run([sys.executable, '-c', program], stdout=out, check=True)
    assert file.read_text() == 'before printed\nwritten after\n'
