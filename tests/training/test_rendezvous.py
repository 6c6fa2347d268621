"""Processes of a run find each other, refuse strangers and compare their settings before they start."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from conftest import make_image_folder
from hypothesis import given
from hypothesis import strategies as st
from processes import Script, free_port, in_processes

from datasets import build_dataset
from training import rendezvous
from training.arguments import parse_args
from training.checkpoints import find_latest_checkpoint
from training.launch import resolve_launch_environment
from training.rendezvous import difference, job_name, meet, require_same, require_same_images, settings_of
from utils import RankError, UserError

SMALL = ["--model", "avit_micro_patch4_32", "--input-size", "32", "--num_workers", "0", "--no-model-ema"]
PREFIXES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "SLURM_", "PBS_", "LSB_", "TORCHELASTIC_")


@pytest.fixture
def environment(monkeypatch):
    """Return a function that sets the variables of launchers, after removing all others."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(PREFIXES)}

    def set_variables(**variables):
        monkeypatch.setattr(os, "environ", others | variables)

    return set_variables


def slurm(job, rank, port, **more):
    variables = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_NUM_TASKS": 2, "SLURM_JOB_ID": job}
    variables |= {"SLURM_STEP_ID": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **more}
    return {name: str(value) for name, value in variables.items()}


def by_hand(rank, port, world_size=2):
    variables = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in variables.items()}


def test_stranger_is_refused_and_the_own_process_still_joins(tmp_path):
    """Process 1 of another job comes first. It is refused by name, and the first job trains with its own process."""
    port, data = free_port(), make_image_folder(tmp_path / "data", classes=2, train=4, val=2)
    argv = [*SMALL, "--data-path", data, "--batch-size", "2", "--epochs", "1"]

    def start(name, job, rank, *more):
        return Script("main_act.py", *argv, *more, log=tmp_path / name, environment=slurm(job, rank, port))

    host = start("host", 1001, 0, "--output_dir", tmp_path / "out")
    stranger = start("stranger", 1002, 1, "--seed", "5")
    assert stranger.wait() == 2
    assert stranger.errors().count("\n") <= 2  # the error, after at most a warning that the process waits
    assert "process 1 belongs to Slurm job 1002, step 0, but process 0" in stranger.errors()
    assert "belongs to Slurm job 1001, step 0. Set another MASTER_PORT" in stranger.errors()
    own = start("own", 1001, 1, "--output_dir", tmp_path / "out")
    assert [host.wait(), own.wait()] == [0, 0], host.errors() + own.errors()
    assert (tmp_path / "out" / "log.txt").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("seed", "--seed is 5 instead of 0"),
        ("data", "the number of images in --data-path is 10 instead of 8"),
        ("world size", "WORLD_SIZE is 3 instead of 2"),
    ],
)
def test_difference_ends_every_process(tmp_path, change, named):
    port, data = free_port(), make_image_folder(tmp_path / "data", classes=2, train=4, val=2)
    other = make_image_folder(tmp_path / "other", classes=2, train=5, val=2)
    paths = [data, other if change == "data" else data]
    group = [
        Script(
            "main_act.py",
            *[*SMALL, "--data-path", paths[rank], "--epochs", 1, "--output_dir", tmp_path / "out"],
            *["--seed", 5 * rank if change == "seed" else 0],
            log=tmp_path / str(rank),
            environment=by_hand(rank, port, 2 + rank * (change == "world size")),
        )
        for rank in range(2)
    ]
    assert [process.wait() for process in group] == [2, 2]
    for process in group:
        assert process.errors().count("process 1 differs from process 0: ") == 1
        assert named in process.errors()
        assert "Traceback" not in process.errors()
    assert not (tmp_path / "out" / "log.txt").exists()


def test_port_in_use_raises(environment):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment(**by_hand(0, port))
        with pytest.raises(RankError, match=f"port {port} of this machine is in use.*Set MASTER_PORT to a free port"):
            meet("env://", 0, 2, {})


def test_host_name_that_cannot_be_resolved_raises(environment, monkeypatch):
    monkeypatch.setattr(rendezvous, "RESOLVE_SECONDS", 0.05)
    for host in ("no host", "a..b", "x" * 70):
        environment(**by_hand(1, 1) | {"MASTER_ADDR": host})
        with pytest.raises(RankError, match=f"'{host}' of process 0 cannot be resolved.*Set MASTER_ADDR"):
            meet("env://", 1, 2, {})


@pytest.mark.parametrize("url", ["tcp://127.0.0.1", "tcp://:29500", "tcp://host:port", "tcp://host:70000", "tcp://"])
def test_invalid_url_raises(url):
    with pytest.raises(RankError, match=r"--dist-url .*: expected tcp://HOST:PORT"):
        meet(url, 0, 2, {})


def test_second_process_with_a_rank_raises(environment):
    environment()
    store = dist.HashStore()
    rendezvous._refuse_strangers(store, 0, "here")
    rendezvous._refuse_strangers(store, 1, "here")
    with pytest.raises(RankError, match="another process 1 is already connected to process 0 at here"):
        rendezvous._refuse_strangers(store, 1, "here")


def test_process_outside_of_jobs_fits_any_job(environment):
    store = dist.HashStore()
    environment(SLURM_JOB_ID="7")
    rendezvous._refuse_strangers(store, 0, "here")
    environment()
    rendezvous._refuse_strangers(store, 1, "here")
    environment(SLURM_JOB_ID="8")
    with pytest.raises(
        RankError, match="process 2 belongs to Slurm job 8, but process 0 at here belongs to Slurm job 7"
    ):
        rendezvous._refuse_strangers(store, 2, "here")


def test_steps_of_a_job_are_runs_of_their_own_if_they_have_several_tasks(environment):
    """With one task per step, a user gives the ranks, and the steps may form one run."""
    environment(SLURM_JOB_ID="7", SLURM_STEP_ID="2", SLURM_STEP_NUM_TASKS="1")
    assert job_name() == "Slurm job 7"
    environment(SLURM_JOB_ID="7", SLURM_STEP_ID="2", SLURM_STEP_NUM_TASKS="4", SLURM_HET_JOB_ID="6")
    assert job_name() == "Slurm job 6, step 2"
    environment(PBS_JOBID="9.server")
    assert job_name() == "PBS job 9.server"


SETTINGS = st.dictionaries(st.sampled_from(["--lr", "--seed", "--opt"]), st.sampled_from("01"))


@given(st.lists(SETTINGS, min_size=1, max_size=4))
def test_all_processes_start_or_none_does(ranks):
    """Each of the processes raises the same error exactly if the settings of one differ from those of process 0."""
    store = dist.HashStore()

    def compare(rank):
        try:
            rendezvous._compare(store, rank, len(ranks), ranks[rank])
        except RankError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(ranks)) as pool:
        messages = list(pool.map(compare, range(len(ranks))))
    assert [message != "" for message in messages] == [any(own != ranks[0] for own in ranks)] * len(ranks)


def test_difference_names_the_first_settings():
    first = {f"--{n}": str(n) for n in range(9)}
    message = difference({name: "x" for name in first}, first, 3)
    assert message.startswith("process 3 differs from process 0: --0 is x instead of 0; --1 is x instead of 1; ")
    assert "--4 is x instead of 4; and 4 more." in message
    assert difference(dict(first), first, 3) == ""


@pytest.mark.parametrize(("own", "differs"), [("Slurm job 7", False), ("Slurm job 8", True), ("", False)])
def test_processes_of_torchrun_in_two_jobs_differ(own, differs):
    """Two jobs may give torchrun the same address and id."""
    first = {"the scheduler's job": "Slurm job 7", "--lr": "1"}
    message = difference(first | {"the scheduler's job": own}, first, 1)
    assert differs == ("the scheduler's job is Slurm job 8 instead of Slurm job 7" in message) == bool(message)


def test_settings_ignore_what_may_differ_per_machine(tmp_path):
    files = [tmp_path / name / "c.pth" for name in "abc"]
    for file, content in zip(files, ("same", "same", "else")):
        file.parent.mkdir()
        file.write_text(content)

    def settings(folder, file, *flags):
        return settings_of(parse_args(["--output_dir", folder, "--finetune", str(file), *flags]))

    first = settings("one", files[0], "--num_workers", "3")
    assert settings("two", files[1], "--num_workers", "4") == first
    assert "--finetune is a file with checksum" in difference(settings("one", files[2]), first, 1)
    assert "--output-dir is not given" in difference(settings("", files[0]), first, 1)
    assert "--lr is 1.0 instead of 0.0005" in difference(settings("one", files[0], "--lr", "1"), first, 1)


def _require_same_images(rank, folders, path):
    images = build_dataset("IMNET", str(folders[0]), False, (32, 32))
    assert require_same_images(images) is images
    with pytest.raises(RankError, match=r"process 1 differs .*: the checksum of the image names and labels is"):
        require_same_images(build_dataset("IMNET", str(folders[rank]), False, (32, 32)))
    (path / str(rank)).touch()


def test_images_of_other_names_are_refused(tmp_path):
    folders = [make_image_folder(tmp_path / name, classes=2, train=1, val=2) for name in "ab"]
    renamed = next(path for path in (folders[1] / "val").rglob("*") if path.is_file())
    renamed.rename(renamed.with_stem("other"))
    in_processes(_require_same_images, folders, tmp_path)
    assert (tmp_path / "1").exists()


def _require_same(rank, path):
    require_same({"the number of images": 7})
    with pytest.raises(RankError, match="process 1 differs from process 0: the number of images is 8 instead of 7"):
        require_same({"the number of images": 7 + rank})
    (path / str(rank)).touch()


def test_values_are_compared_between_processes(tmp_path):
    in_processes(_require_same, tmp_path)
    assert (tmp_path / "0").exists()


def _find_checkpoint(rank, folder):
    disk = folder / str(rank)
    disk.mkdir()
    (disk / "checkpoint.pth").write_text("same")
    assert find_latest_checkpoint(disk) == str(disk / "checkpoint.pth")
    (disk / "checkpoint.pth").write_text(str(rank))
    with pytest.raises(RankError, match=r"process 1 differs .*: the checksum of checkpoint\.pth in --output-dir is "):
        find_latest_checkpoint(disk)
    if rank == 0:
        (disk / "checkpoint.pth").unlink()
    with pytest.raises(UserError, match=r"checkpoint\.pth exists for some processes only"):
        find_latest_checkpoint(disk)


def test_checkpoints_to_resume_are_compared_between_processes(tmp_path):
    in_processes(_find_checkpoint, tmp_path)


LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
ADDRESS = ("MASTER_ADDR", "MASTER_PORT", "SLURM_LAUNCH_NODE_IPADDR", "SLURM_JOB_ID", "SLURM_STEP_ID")
VALUES = st.sampled_from(["", " ", "0", "1", "2", "-1", "1.5", "x", "²", "٣", "9" * 5000])
ADDRESSES = st.sampled_from(["", "127.0.0.1", "0", "70000", "-1", "x y", "a..b"])


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(LAUNCHED, VALUES) | dict.fromkeys(ADDRESS, ADDRESSES)))
def test_any_launcher_variables_give_a_position_or_one_line(environment, variables):
    environment(**variables)
    try:
        launch = resolve_launch_environment()
        assert 0 <= launch.rank < launch.world_size
        if launch.world_size > 1:
            rendezvous._address("env://")
    except RankError as error:
        message = str(error)
        assert len(message.splitlines()) == 1
        assert any(name in message for name in LAUNCHED + ADDRESS)
        assert any(fix in message for fix in ("et ", "aunch with", "tart", "expected"))
