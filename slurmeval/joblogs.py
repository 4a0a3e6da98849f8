"""The logs of a job on the cluster: of its script, of a phase, of a benchmark; as they grow."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from slurmeval.cluster import scheduler as framing
from slurmeval.cluster.connect import connect, scheduler_of
from slurmeval.cluster.host import Host, Prompt
from slurmeval.cluster.scheduler import LOG_CHUNK
from slurmeval.cluster.text import one_line, printable, quote_path
from slurmeval.errors import ClusterError, ConfigError
from slurmeval.record import Record
from slurmeval.retry import until_it_answers

#: Phase -> the logs of its steps, in the directory of the last attempt.
PHASES = {
    "model": "model.log",
    "ray": "ray-*.log",
    "serve": "serve.log",
    "evaluate": "",
    "verdict": "verdict.log",
}
_TASK = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
_TIMEOUT = 60.0

# The log of the script itself lies where its --output says; all others in logs/<attempt>.
_READ = """cd -- {job_dir} || exit 66
{prelude}
last=$(ls logs 2>/dev/null | grep -x '[0-9][0-9]*' | sort -n | tail -n 1)
show() {{
    [ -f "$2" ] || return 0
    case $1 in *[!A-Za-z0-9._-]*) return 0 ;; esac
    from={first}
    case $1 in {known} *) ;; esac
    [ "$from" != tail ] || from=$(($(wc -c < "$2") - {chunk}))
    [ "$from" -ge 0 ] || from=0
    log "$1" "$2" "$from"
}}
{files}
answer "::there" sh -c 'cd "logs/$1" 2>/dev/null && ls' sh "$last"
exit 0
"""
# Elements of an array write a log each. Before they begin, Slurm names the one of no element,
# whose number is 2^32 - 2.
_OWN = """path={default}
[ ! -s .log-path ] || IFS= read -r path < .log-path
[ -e "$path" ] || [ ! -e {element} ] || path={element}
head=
case $path in
    *4294967294*) head=${{path%%4294967294*}} ;;
    *{job}_[0-9]*)
        head=${{path%{job}_*}}{job}_
        case ${{path#"$head"}} in */*) head= ;; esac ;;
esac
if [ -z "$head" ]; then show job "$path"; else
    rest=${{path#"$head"}}
    tail=${{rest#"${{rest%%[!0-9]*}}"}}
    for file in "$head"*"$tail"; do
        number=${{file#"$head"}}
        show "job_${{number%"$tail"}}" "$file"
    done
fi
"""
_STEPS = """for file in "logs/$last"/{pattern}; do show "$(basename "$file" .log)" "$file"; done
"""
_TASKS = """for file in eval/*.yaml; do
    name=$(basename "$file" .yaml); show "$name" "logs/$last/$name.log"
done
"""


@dataclass(frozen=True)
class Chunk:
    """New text of one log."""

    name: str
    text: str


@dataclass
class LogReader:
    """Reads the logs of a job, each time what is new since the last time.

    Attributes:
        host: Where the job is.
        record: The job.
        phase: One of `PHASES`; None for the script's own log.
        task: A benchmark's name, instead of a phase.
        whole: Begin at the beginning of each log, not near its end.
        there: The logs that the last attempt has, whichever are read.
        full: Whether the last read may have left something, because one read is limited.
    """

    host: Host
    record: Record
    phase: str | None = None
    task: str | None = None
    whole: bool = False
    there: list[str] = field(default_factory=list)
    full: bool = False
    _offsets: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.phase is not None and self.phase not in PHASES:
            raise ConfigError(f"no phase {self.phase!r}; there are {', '.join(PHASES)}")
        if self.task is not None and not _TASK.match(self.task):
            raise ConfigError(f"{self.task!r} is not the name of a benchmark")

    def read(self, *, live: bool = False) -> list[Chunk]:
        """Return what is new; nothing where there is no such log yet.

        Args:
            live: Leave an unfinished last line for the next time.

        Raises:
            ClusterError: There is no connection, or the job's directory is gone.
        """
        done = self.host.run(self._script(), timeout=_TIMEOUT)
        if done.returncode != 0:
            raise ClusterError(
                f"cannot read logs in {self.record.remote_dir}: {one_line(done.stderr)}"
            )
        found = framing.sections(done)
        self.there = found.pop("::there").text.split() if "::there" in found else []
        chunks = []
        self.full = any(len(section.data) >= LOG_CHUNK for section in found.values())
        for name, section in found.items():
            text, self._offsets[name] = framing.log_of(section, 0, live=live)
            if text:
                chunks.append(Chunk(name, text))
        return chunks

    def _script(self) -> str:
        if self.task is not None:
            files = _STEPS.format(pattern=f"{self.task}.log")
        elif self.phase == "evaluate":
            files = _TASKS
        elif self.phase is not None:
            files = _STEPS.format(pattern=PHASES[self.phase])
        else:
            plain = self.record.env.get("executor") == "local"
            job = self.record.job_id or ""
            files = _OWN.format(
                default=shlex.quote("job.log" if plain else f"slurm-{job}.out"),
                element=shlex.quote(f"slurm-{job}_0.out"),
                job=shlex.quote(job),
            )
        known = " ".join(
            f"{shlex.quote(name)}) from={offset} ;;" for name, offset in self._offsets.items()
        )
        return _READ.format(
            job_dir=quote_path(self.record.remote_dir),
            prelude=framing.PRELUDE,
            first=0 if self.whole else "tail",
            known=known,
            chunk=LOG_CHUNK,
            files=files,
        )


def stream(
    record: Record,
    *,
    phase: str | None = None,
    task: str | None = None,
    lines: int | None = 100,
    follow: bool = False,
    prompt: Prompt | None = None,
    tell: Callable[[str], None] = lambda text: None,
    host: Host | None = None,
    sleep: Callable[[float], None] = time.sleep,
    pause: float = 2.0,
) -> Iterator[Chunk]:
    """Yield the logs of a job: their last lines, and with ``follow`` what comes until its end.

    Args:
        record: The job.
        phase: One of `PHASES`; None for the script's own log.
        task: A benchmark's name, instead of a phase.
        lines: How many last lines of each log; None for all.
        follow: Go on until the job has ended.
        prompt: Asks the user for passphrases and codes.
        tell: Says that the connection was lost.
        host: Another host than the record names.
        sleep: Waits for some seconds.
        pause: Seconds between two looks.

    Raises:
        ConfigError: The job never started, there is no such phase, or it has no such log.
        ClusterError: There is no connection, or the job's directory is gone.
    """
    if record.job_id is None:
        raise ConfigError(
            f"{record.name} was never started", hint=f"slurmeval status {record.name}"
        )
    host = host or connect(record.access, prompt=prompt)
    reader = LogReader(host, record, phase, task, whole=lines is None)
    try:
        chunks = reader.read(live=follow)
        if not chunks and not follow:
            raise _nothing(record, reader)
        yield from (_last_lines(chunk, lines) for chunk in chunks)
        while reader.full or follow:
            while reader.full:
                yield from reader.read(live=follow)
            if follow:
                follow = until_it_answers(partial(_live, host, record), tell=tell, sleep=sleep)
                read = partial(reader.read, live=follow)
                yield from until_it_answers(read, tell=tell, sleep=sleep)
                if follow:
                    sleep(pause)
    finally:
        host.close()


def _live(host: Host, record: Record) -> bool:
    scheduler = scheduler_of(record.access, host)
    seen = scheduler.poll(record.job_id or "", record.remote_dir, log_offset=-1)
    return not seen.state.ended and not seen.gone


def _last_lines(chunk: Chunk, lines: int | None) -> Chunk:
    if lines is None:
        return chunk
    kept = chunk.text.splitlines(keepends=True)
    return Chunk(chunk.name, "".join(kept[max(0, len(kept) - lines) :]))


def _nothing(record: Record, reader: LogReader) -> ConfigError:
    there = ", ".join(printable(name) for name in reader.there)
    what = f"log of {reader.task or reader.phase}" if reader.task or reader.phase else "log yet"
    return ConfigError(
        f"{record.name} has no {what}",
        hint=f"Logs of its last attempt: {there}" if there else "It may not have started yet.",
    )
