"""Slurm: sbatch that never makes two jobs, and a look at any number of jobs in one command.

Who is asked for a state: squeue, else sacct, else scontrol, else the job itself; see
`slurmeval.cluster.slurm_states`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

from slurmeval.cluster import scheduler
from slurmeval.cluster.host import Completed, Host
from slurmeval.cluster.scheduler import JobState, Refused, Section, Snapshot, Started, Watched
from slurmeval.cluster.slurm_states import judge
from slurmeval.cluster.text import one_line, quote_path
from slurmeval.errors import ClusterError, CommandFailed, ConnectionFailed

#: Seconds for one answer of Slurm; a controller that is down takes about ten to say so.
_TIMEOUT = 100.0
#: What the script of a submission ends with where there is certainly no job.
_REFUSED = 76
_JOB_ID = re.compile(r"^\d+$")
#: A job's own log, unless its script says otherwise.
LOG = "slurm-{job}.out"

# A non-interactive shell may lack the site's PATH; its profile then knows.
_SETUP = """if ! command -v sbatch >/dev/null 2>&1 && [ -r /etc/profile ]; then
    . /etc/profile >/dev/null 2>&1
fi
"""

# Where one controller serves several clusters, each command names the one that is meant.
_CLUSTERS = "\n".join(
    f'{command}() {{{{ command {command} --clusters={{clusters}} "$@"; }}}}\n'
    for command in ("squeue", "sacct", "scontrol", "scancel", "sinfo")
)


def setup(clusters: str | None) -> str:
    """Return the beginning of each script that asks Slurm.

    Args:
        clusters: The cluster behind the login node that is meant; None for its own.
    """
    return _SETUP + (_CLUSTERS.format(clusters=shlex.quote(clusters)) if clusters else "")


# `.submitting` is a link that says who calls sbatch (machine:process:second): a link appears whole
# and only once. `.job-id` keeps sbatch's answer. Whoever finds a `.submitting` whose owner is gone
# asks Slurm for the name before it would ever make a second job.
_KNOWN = """cd -- {job_dir} || exit 66
name={name}
remembered() {{
    [ ! -s .job-id ] || return 0
    ids=$(squeue -h -t all --name="$name" -o %F 2>&1) || {{ printf '%s\n' "$ids" >&2; return 75; }}
    # Without -S, sacct looks no further back than midnight.
    [ -n "$ids" ] || ids=$(sacct -n -X -P -S now-30days --name="$name" -o JobIDRaw 2>/dev/null)
    # A job that everybody has forgotten has left its log.
    [ -n "$ids" ] || ids=$(ls | sed -n 's/^slurm-\\([0-9]*\\)\\.out$/\\1/p')
    [ -n "$ids" ] || return 1
    printf '%s\n' "$ids" | sort -n | head -n 1 > .job-id.part && mv .job-id.part .job-id
}}
busy() {{
    owner=$(readlink .submitting) || return 1
    machine=${{owner%%:*}}
    since=${{owner##*:}}
    process=${{owner#*:}}
    if [ "$machine" = "$(uname -n)" ]; then
        ! pgrep -u "$(id -u)" -f -- "--job-name=$name" >/dev/null 2>&1 || return 0
        kill -0 "${{process%:*}}" 2>/dev/null || return 1
    fi
    [ $(($(date +%s) - since)) -lt 90 ]
}}
"""

_FIND = """if [ ! -s .job-id ]; then
    [ -L .submitting ] || exit 1
    ! busy || { echo "sbatch is still under way" >&2; exit 75; }
    remembered || exit
fi
cat .job-id
"""

_SUBMIT = """{prelude}
[ -f job.sbatch ] || {{ echo "there is no job.sbatch" >&2; exit 66; }}
command -v sbatch >/dev/null || {{ echo "sbatch: not found" >&2; exit 76; }}
told() {{ answer job cat .job-id; answer log cat .log-path; exit 0; }}
tries=0 doubt=
until [ -s .job-id ] || ln -sT "$(uname -n):$$:$(date +%s)" .submitting 2>/dev/null; do
    doubt=1 tries=$((tries + 1))
    if busy; then
        [ "$tries" -lt 40 ] || {{ echo "an earlier attempt is still under way" >&2; exit 75; }}
        sleep 0.5
    else
        mv -T .submitting ".submitting-$$" 2>/dev/null && rm -f ".submitting-$$"
        [ "$tries" -lt 99 ] || {{ echo "cannot write in $PWD" >&2; exit 66; }}
    fi
done
[ ! -s .job-id ] || told
if [ -n "$doubt" ]; then
    remembered; found=$?
    [ "$found" != 0 ] || told
    [ "$found" != 75 ] || exit 75
    [ ! -e status.json ] || {{ echo "a job ran here that Slurm has forgotten" >&2; exit 66; }}
fi
answer estimate timeout 20 sbatch --test-only {options} job.sbatch
words=$(timeout 60 sbatch --parsable {options} job.sbatch 2>&1 > .job-id.part); code=$?
if [ "$code" = 0 ]; then
    mv .job-id.part .job-id
    id=$(sed -n 's/^ *\\([0-9][0-9]*\\)\\(;.*\\)*$/\\1/p' .job-id | tail -n 1)
    scontrol show job "$id" 2>/dev/null | sed -n 's/^ *StdOut=//p' | head -n 1 > .log-path
    told
fi
printf '%s\n' "$words" >&2; cat .job-id.part >&2; rm -f .job-id.part
# Slurm may have taken the job although its answer did not come.
case $code:$words in
    124:* | *"timed out"* | *"ontact slurm controller"* | *"onnection refused"*) exit 75 ;;
    *"eceive failure"* | *"onnection failure"* | *"onnection reset"* | *"Zero Bytes"*) exit 75 ;;
    1[3-5][0-9]:*) exit 75 ;; # a signal ended it
esac
rm -f .submitting; exit 76
"""

_POLL = """{prelude}
answer squeue squeue -h -t all -j {commas} -o '%i|%T|%r'; asked="$? $out"
has() {{ printf '%s\n' "$2" | grep -Eq "^$1([_+][^|]*)?[|]($3)"; }}
live='PENDING|RUNNING|CONFIGURING|COMPLETING|SUSPENDED|REQUEUE|RESIZING|SIGNALING|STAGE_OUT|STOPPED|POWER_UP'
ended=
for job in {jobs}; do has "$job" "$out" "$live" || ended=$ended,$job; done
if [ -n "$ended" ]; then
    answer sacct sacct -n -P -j "${{ended#,}}" -o JobID,State,ExitCode; accounted=$out
    # Where the controller does not answer, asking it twice only doubles the wait.
    case $asked in
        0* | *"nvalid job id"*)
            for job in $(printf %s "$ended" | tr , ' '); do
                if ! has "$job" "$accounted" '' || has "$job" "$accounted" "$live"; then
                    answer "scontrol:$job" scontrol show job -o "$job"
                fi
            done ;;
    esac
fi
look() {{
    cd -- "$2" 2>/dev/null || return 0
    [ ! -e status.json ] || answer "status:$1" cat status.json
    left "left:$1" "$1"
    [ "$3" -ge 0 ] || return 0
    path=slurm-$1.out
    [ ! -s .log-path ] || IFS= read -r path < .log-path
    log "log:$1" "$path" "$3"
}}
"""

#: A piece of sbatch's own words -> what probably helps.
_REMEDIES = (
    ("account", "Check run.env.account; `sacctmgr show assoc user=$USER` lists yours."),
    ("partition", "Check run.env.partition; `sinfo -s` on the cluster lists the partitions."),
    ("qos", "Check run.env.qos; `sacctmgr show qos` lists what there is."),
    ("unable to contact", "The Slurm controller does not answer. Try again later."),
    ("not found", "Slurm's commands are not on the PATH of a non-interactive shell there."),
    ("container", "pyxis is not installed there: set run.env.container_runtime to none."),
    ("generic resource", "Check run.env.gpu_request and run.env.gpus_per_node."),
    ("gres", "Check run.env.gpu_request and run.env.gpus_per_node."),
    ("time limit", "Check run.env.time against the partition's limit (`sinfo -o '%P %l'`)."),
    ("node configuration", "Check nodes, gpus_per_node, cpus and mem in run.env."),
    ("node count", "Check run.env.nodes against the partition (`sinfo -s`)."),
    ("memory", "Check run.env.mem against the nodes (`sinfo -o '%P %m'`)."),
    ("unrecognized option", "This Slurm does not know that option; see run.env.sbatch_args."),
)
_TO_START = re.compile(r"to start at (\S+) using \d+ processors on nodes (.+)")
_UNANSWERED = ("timed out", "ontact slurm controller", "onnection refused")


class Slurm:
    """Jobs of Slurm on a host where its commands are.

    Args:
        host: The host.
        clusters: The cluster that ``sbatch --clusters`` names; None for the host's own.
    """

    def __init__(self, host: Host, clusters: str | None = None) -> None:
        self._host, self._setup = host, setup(clusters)
        self._options = [f"--clusters={clusters}"] if clusters else []

    def submit(
        self,
        job_dir: str,
        *,
        name: str,
        partition: str | None = None,
        extra: Sequence[str] = (),
    ) -> Started:
        """See `slurmeval.cluster.scheduler.Scheduler.submit`."""
        options = [
            f"--job-name={name}",
            *self._options,
            *([f"--partition={partition}"] if partition else []),
            *extra,
        ]
        steps = _SUBMIT.format(prelude=scheduler.PRELUDE, options=shlex.join(options))
        done = self._ask(job_dir, name, steps)
        if done.returncode not in (0, _REFUSED):
            raise ConnectionFailed(
                f"sbatch on {self._host.name} was cut short: exit status {done.returncode}"
            )
        if done.returncode == _REFUSED:
            words = _words(done)
            raise Refused(
                f"sbatch on {self._host.name} refused the job: {words}", hint=_remedy(words)
            )
        found = scheduler.sections(done)
        log = found["log"].text if "log" in found and found["log"].returncode == 0 else ""
        return Started(
            _parse_id(found["job"].text if "job" in found else ""),
            log if log.startswith("/") else None,
            *_expectation(found.get("estimate")),
        )

    def test_only(self, script: bytes, *, name: str) -> str:
        """See `slurmeval.cluster.scheduler.Scheduler.test_only`."""
        options = shlex.join([f"--job-name={name}", *self._options])
        command = f"{self._setup}exec sbatch --test-only {options}"
        done = self._host.run(command, timeout=_TIMEOUT, input=script)
        words = _words(done)
        if done.returncode == 0:
            return _estimate(words)
        if any(piece in words for piece in _UNANSWERED):
            raise ConnectionFailed(f"Slurm on {self._host.name} does not answer: {words}")
        raise Refused(
            f"Slurm on {self._host.name} would refuse the job: {words}", hint=_remedy(words)
        )

    def find(self, job_dir: str, *, name: str) -> str | None:
        """See `slurmeval.cluster.scheduler.Scheduler.find`."""
        done = self._ask(job_dir, name, _FIND)
        return None if done.returncode == 1 else _parse_id(done.stdout)

    def _ask(self, job_dir: str, name: str, steps: str) -> Completed:
        known = _KNOWN.format(job_dir=quote_path(job_dir), name=shlex.quote(name))
        done = self._host.run(self._setup + known + steps, timeout=_TIMEOUT)
        if done.returncode == 75:
            raise ConnectionFailed(f"Slurm on {self._host.name} does not answer: {_words(done)}")
        if done.returncode == 66:
            raise CommandFailed(f"cannot submit from {job_dir}: {_words(done)}")
        return done

    def poll(self, job_id: str, job_dir: str, *, log_offset: int) -> Snapshot:
        """See `slurmeval.cluster.scheduler.Scheduler.poll`."""
        return self.poll_many([Watched(job_id, job_dir, log_offset)])[0]

    def poll_many(self, jobs: Sequence[Watched]) -> list[Snapshot]:
        """See `slurmeval.cluster.scheduler.Scheduler.poll_many`."""
        if not jobs:
            return []
        ids = [_checked(job.job_id) for job in jobs]
        script = self._setup + _POLL.format(
            prelude=scheduler.PRELUDE, commas=",".join(ids), jobs=" ".join(ids)
        )
        for job in jobs:
            script += f"(look {job.job_id} {quote_path(job.job_dir)} {int(job.log_offset)})\n"
        found = scheduler.look(self._host, script, timeout=_TIMEOUT)
        snapshots = [_snapshot(job, found) for job in jobs]
        # Where squeue does not answer, a job that goes on elsewhere may seem to have ended.
        asked = found.get("squeue")
        if asked is not None and (asked.returncode == 0 or "nvalid job id" in asked.text):
            left = {
                job.job_dir: job.job_id
                for job, seen in zip(jobs, snapshots, strict=True)
                if seen.state.ended and f"left:{job.job_id}" in found
            }
            scheduler.clear(self._host, left)
        return snapshots

    def cancel(self, job_id: str, job_dir: str) -> None:
        """See `slurmeval.cluster.scheduler.Scheduler.cancel`."""
        done = self._host.run(f"{self._setup}scancel {_checked(job_id)}", timeout=_TIMEOUT)
        if done.returncode != 0:
            raise CommandFailed(f"scancel {job_id} failed: {one_line(done.stderr)}")


def _snapshot(job: Watched, found: Mapping[str, Section]) -> Snapshot:
    status = scheduler.status_of(found.get(f"status:{job.job_id}"))
    judged = judge(job.job_id, found)
    state, source, gone = judged.state, judged.source, judged.gone
    own = scheduler.state_of_status(status)
    if state is JobState.UNKNOWN and own.ended:
        state, source, gone = own, "status.json", False
    log, offset = scheduler.log_of(
        found.get(f"log:{job.job_id}"), job.log_offset, live=not state.ended
    )
    return Snapshot(state, judged.exit_code, source, status, log, offset, gone, judged.reason)


def _checked(job_id: str) -> str:
    if not _JOB_ID.match(job_id):
        raise ClusterError(f"not a Slurm job id: {job_id!r}")
    return job_id


def _words(done: Completed) -> str:
    return one_line(done.stderr) or one_line(done.stdout) or "no reason given"


def _expectation(section: Section | None) -> tuple[str, bool]:
    """Return what ``sbatch --test-only`` said, and whether it said no."""
    if section is None or any(piece in section.text for piece in _UNANSWERED):
        return "", False
    return _estimate(one_line(section.text)), section.returncode not in (0, 124, 127)


def _estimate(words: str) -> str:
    """Return the estimate without the id that Slurm used up for the question."""
    match = _TO_START.search(words)
    return f"would start at {match[1]} on {match[2]}" if match else words


def _parse_id(output: str) -> str:
    """Return the job id of ``id`` or ``id;cluster``, wherever a site's wrapper put more lines."""
    for line in reversed(output.splitlines()):
        job_id = line.strip().split(";")[0]
        if _JOB_ID.match(job_id):
            return job_id
    raise ClusterError(f"sbatch gave no job id, but: {one_line(output) or 'nothing'}")


def _remedy(words: str) -> str | None:
    low = words.lower()
    return next((remedy for piece, remedy in _REMEDIES if piece in low), None)
