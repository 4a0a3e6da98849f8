"""The stand-in for pyxis does what the other tests take it for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurmcluster import SlurmCluster

pytestmark = pytest.mark.slurm

IMAGE = "registry.example/tests/standin:1.0"


@pytest.fixture(scope="module")
def image(slurm_cluster: SlurmCluster) -> Path:
    return slurm_cluster.make_image(IMAGE, {"COLOUR": "image", "SHAPE": "image"})


@pytest.fixture
def silent_failures(slurm_cluster: SlurmCluster) -> Iterator[None]:
    slurm_cluster.silent_container_failures(True)
    yield
    slurm_cluster.silent_container_failures(False)


def test_tasks_run_inside_the_image_as_the_user(slurm_cluster: SlurmCluster, image: Path) -> None:
    for name in (IMAGE, str(image)):
        out = slurm_cluster.user_exec(
            *("srun", "-N2", f"--container-image={name}"),
            *("bash", "-c", "cat /image-name; id -un; pwd"),
        ).stdout
        assert sorted(out.split()) == sorted(2 * [IMAGE, slurm_cluster.user, "/"])


def test_the_python_of_the_tests_runs_inside(slurm_cluster: SlurmCluster, image: Path) -> None:
    out = slurm_cluster.user_exec(
        *("srun", f"--container-image={image}", sys.executable, "-c"),
        "import slurmeval; print(slurmeval.__name__, open('/image-name').read())",
    ).stdout
    assert out.split() == ["slurmeval", IMAGE]


def test_the_host_is_not_seen_without_a_mount(
    slurm_cluster: SlurmCluster, image: Path, user_dir: Path
) -> None:
    step = ["srun", f"--container-image={image}"]
    for options, seen in (
        ([], False),
        (["--no-container-mount-home"], False),
        (["--container-mount-home"], True),
        ([f"--container-mounts={user_dir}:{user_dir}"], True),
        ([f"--container-mounts={user_dir}"], True),
    ):
        done = slurm_cluster.user_exec(*step, *options, "ls", "-d", user_dir, check=False)
        assert (done.returncode == 0) is seen, options


def test_mounts_and_working_directory(
    slurm_cluster: SlurmCluster, image: Path, user_dir: Path
) -> None:
    for name in ("rw", "ro"):
        slurm_cluster.user_exec("mkdir", user_dir / name)
    done = slurm_cluster.user_exec(
        *("srun", f"--container-image={image}", "--container-workdir=/in/rw"),
        f"--container-mounts={user_dir}/rw:/in/rw,{user_dir}/ro:/in/ro:ro",
        *("bash", "-c", "pwd; touch here; touch /in/ro/there"),
        check=False,
    )
    assert done.stdout == "/in/rw\n"
    assert "Read-only file system" in done.stderr
    assert (user_dir / "rw" / "here").exists()
    assert not (user_dir / "ro" / "there").exists()


def test_the_root_is_read_only_unless_asked(slurm_cluster: SlurmCluster, image: Path) -> None:
    step = ["srun", f"--container-image={image}"]
    write = ["bash", "-c", "touch /new /tmp/new"]
    assert slurm_cluster.user_exec(*step, *write, check=False).returncode != 0
    slurm_cluster.user_exec(*step, "--container-writable", *write)
    assert not (image / "new").exists()


def test_the_image_sets_variables_unless_kept(slurm_cluster: SlurmCluster, image: Path) -> None:
    out = slurm_cluster.user_exec(
        *("env", "COLOUR=job", "SHAPE=job", "SIZE=job", "srun", f"--container-image={image}"),
        *("--container-env=SHAPE,SIZE", "bash", "-c", "echo $COLOUR $SHAPE $SIZE"),
    ).stdout
    assert out == "image job job\n"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--container-image=registry.example/absent:1", "no such image"),
        ("--container-mounts=/absent:/in", "/absent: No such file"),
        ("--container-workdir=/absent", "couldn't chdir to /absent"),
    ],
)
def test_a_container_that_cannot_start_fails_the_step(
    slurm_cluster: SlurmCluster, image: Path, option: str, message: str
) -> None:
    done = slurm_cluster.user_exec(
        "srun", f"--container-image={image}", option, "echo", "ran", check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert message in done.stderr


@pytest.mark.usefixtures("silent_failures")
def test_a_failed_start_can_be_made_to_look_like_success(slurm_cluster: SlurmCluster) -> None:
    done = slurm_cluster.user_exec("srun", "--container-image=absent", "echo", "ran")
    assert done.stdout == ""
    assert "container start failed" in done.stderr


def test_a_running_container_is_joined_by_its_name(
    slurm_cluster: SlurmCluster, image: Path, user_dir: Path
) -> None:
    job = slurm_cluster.sbatch(
        f"""#!/bin/bash
        named=(--overlap --container-name="mine-$SLURM_JOB_ID")
        srun "${{named[@]}}" --container-image={image} --container-mounts={user_dir} \\
          bash -c 'echo one >/tmp/word; touch {user_dir}/up
                   until [ -e /tmp/done ]; do sleep 0.1; done' &
        until [ -e up ]; do sleep 0.1; done
        srun "${{named[@]}}" bash -c 'cat /tmp/word; touch /tmp/done' >word
        wait
        """,
        user_dir,
    )
    assert slurm_cluster.wait_job(job) == "COMPLETED"
    assert (user_dir / "word").read_text() == "one\n"
    starts = slurm_cluster.container_starts(job)
    assert [(start["action"], start["name"]) for start in starts] == [
        ("create", f"mine-{job}"),
        ("join", f"mine-{job}"),
    ]


def test_a_batch_script_runs_inside(
    slurm_cluster: SlurmCluster, image: Path, user_dir: Path
) -> None:
    job = slurm_cluster.sbatch(
        f"#!/bin/bash\n#SBATCH --container-image={image}\ncat /image-name\n",
        user_dir,
        f"--output={user_dir}/out",
    )
    assert slurm_cluster.wait_job(job) == "COMPLETED"
    assert (user_dir / "out").read_text() == f"{IMAGE}\n"
