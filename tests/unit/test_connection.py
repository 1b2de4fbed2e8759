import os
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray

from sdxl_ray import connection
from sdxl_ray.connection import check_room, connect, in_ray_job, remove_stale_cluster_file, sigterm_as_interrupt
from sdxl_ray.errors import ClusterError


@pytest.fixture
def no_ray(monkeypatch, tmp_path):
    """As if Ray had never run here; `ray.init` fails the test unless it replaces it."""
    for name in (*connection.DEFAULT_ENVIRONMENT, "RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(connection, "_CURRENT_CLUSTER", tmp_path / "ray_current_cluster")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("started Ray"))


@pytest.fixture
def started(no_ray, monkeypatch):
    """What `ray.init` was called with."""
    calls = []
    monkeypatch.setattr(ray, "init", lambda **settings: calls.append(settings))
    return calls


def test_without_an_address_ray_starts_on_this_machine(started):
    connect()
    (settings,) = started
    assert settings["address"] == "local"
    assert settings["runtime_env"] is None


@pytest.mark.parametrize(
    ("address", "variable", "expected"), [("a:1", None, "a:1"), (None, "b:2", "b:2"), ("a:1", "b:2", "a:1")]
)
def test_the_address_comes_before_the_variable(started, monkeypatch, address, variable, expected):
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    connect(address)
    assert started[0]["address"] == expected
    assert started[0]["runtime_env"]["py_modules"][0].endswith("sdxl_ray")  # the workers may not have this package


def test_a_submitted_job_brings_its_own_package(started, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert in_ray_job()
    connect("a:1")
    assert started[0]["runtime_env"] is None


def test_the_users_environment_wins(started, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "7")
    connect()
    assert os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "7"
    assert os.environ["RAY_CHDIR_TO_TRIAL_DIR"] == "0"


def test_connected_already(no_ray, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    assert connect("a:1") is None  # `no_ray` fails a start


def test_the_address_for_jobs_is_no_address_to_connect_to(no_ray):
    with pytest.raises(ClusterError) as error:
        connect("http://head:8265")
    assert str(error.value).startswith("http://head:8265 is the address for submitting jobs: `ray job submit")


@pytest.mark.parametrize(
    ("cause", "text"), [(ConnectionError("nobody\nmore"), "nobody"), (TimeoutError(), "TimeoutError")]
)
def test_nobody_answers(no_ray, monkeypatch, cause, text):
    def fail(**_):
        raise cause

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(ClusterError) as error:
        connect("head:6379")
    assert str(error.value).splitlines() == [
        f"no Ray at head:6379: {text}",
        "Check the address with `ray status --address HOST:6379`, or leave it out to use this machine alone.",
    ]


# ---- the note of a dead cluster --------------------------------------------------------------------------------------


def test_the_note_of_a_living_cluster_stays(no_ray):
    with socket.create_server(("127.0.0.1", 0)) as server:
        connection._CURRENT_CLUSTER.write_text(f"127.0.0.1:{server.getsockname()[1]}\n")
        assert not remove_stale_cluster_file()
    assert connection._CURRENT_CLUSTER.exists()


@pytest.mark.parametrize("note", ["dead", "nonsense", ""])
def test_the_note_of_a_dead_cluster_goes(no_ray, note):
    if note == "dead":
        with socket.create_server(("127.0.0.1", 0)) as server:
            note = f"127.0.0.1:{server.getsockname()[1]}"
    connection._CURRENT_CLUSTER.write_text(note)
    assert remove_stale_cluster_file()
    assert not connection._CURRENT_CLUSTER.exists()
    assert not remove_stale_cluster_file()


# ---- room ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nodes(monkeypatch):
    """Two nodes with 4 CPUs, one of them with 2 GPUs; a dead one with many."""
    alive = [{"Alive": True, "Resources": {"CPU": 4.0, "GPU": 2.0}}, {"Alive": True, "Resources": {"CPU": 4.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: [*alive, {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}])


@pytest.mark.parametrize(
    ("num_workers", "resources"),
    [(2, {"CPU": 1, "GPU": 1}), (8, {"CPU": 1}), (4, {"CPU": 2, "GPU": 0}), (2, {"CPU": 3})],
)
def test_what_fits_passes_and_one_more_does_not(nodes, num_workers, resources):
    check_room(num_workers, resources)
    with pytest.raises(ClusterError, match=f"the cluster has room for {num_workers} "):
        check_room(num_workers + 1, resources)
    check_room(num_workers + 1, resources, growing=True)


def test_what_does_not_fit_says_why(nodes):
    with pytest.raises(ClusterError) as error:
        check_room(3, {"CPU": 1.0, "GPU": 1.0})
    assert str(error.value) == (
        "train.num_workers = 3 with 1 CPU, 1 GPU each do not fit: the cluster has room for 2 "
        "(2 nodes: 4 CPU, 2 GPU; 4 CPU, 0 GPU). Lower train.num_workers or cluster.cpus_per_worker, or add machines."
    )


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def handlers():
    """Those of SIGINT and SIGTERM are afterwards what they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("on_ctrl_c", [signal.default_int_handler, signal.SIG_IGN])
def test_sigterm_interrupts(handlers, on_ctrl_c):
    """Also in what a script has started with "&", where Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, on_ctrl_c)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_as_interrupt() as heard:
        assert not heard.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
    assert heard.is_set()
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_does_what_somebody_else_does_on_ctrl_c(handlers):
    """Ray Tune saves its state."""
    asked = []
    signal.signal(signal.SIGINT, lambda number, _: asked.append(number))
    with sigterm_as_interrupt() as heard:
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard.is_set()
    assert asked == [signal.SIGINT]


def test_a_sweep_and_the_command_line_hear_of_one_sigterm(handlers):
    with pytest.raises(KeyboardInterrupt), sigterm_as_interrupt() as heard:
        with sigterm_as_interrupt() as inside:
            assert inside is heard
        os.kill(os.getpid(), signal.SIGTERM)
    assert heard.is_set()


def test_in_another_thread_signals_stay_as_they_are():
    before = signal.getsignal(signal.SIGTERM)

    def work():
        with sigterm_as_interrupt() as heard:
            return signal.getsignal(signal.SIGTERM), heard.is_set()

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(work).result() == (before, False)


def test_ray_does_not_take_sigterm_from_us(no_ray, handlers, monkeypatch):
    monkeypatch.setattr(ray, "init", lambda **_: signal.signal(signal.SIGTERM, lambda *_: sys.exit(15)))
    with sigterm_as_interrupt():
        ours = signal.getsignal(signal.SIGTERM)
        connect()
        assert signal.getsignal(signal.SIGTERM) == ours


def test_sigterm_while_ray_starts_interrupts(no_ray, handlers, monkeypatch):
    def start(**_):
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ray, "init", start)
    with pytest.raises(KeyboardInterrupt), sigterm_as_interrupt() as heard:
        connect()
    assert heard.is_set()


# ---- what Ray prints -------------------------------------------------------------------------------------------------

DEATH = (
    "A worker died or was killed while executing a task by an unexpected system error. To troubleshoot the problem, "
    "check the logs for the dead worker. Lease ID: 0400 Worker ID: e70f Node ID: f94d Worker IP address: 192.0.2.2 "
    "Worker port: 45595 Worker PID: {pid} Worker exit type: SYSTEM_ERROR Worker exit detail: ..."
)


def test_a_process_that_died_is_one_line_and_noise_is_none(monkeypatch, capsys):
    import ray._private.worker as worker

    printed = []
    monkeypatch.delenv("RAY_COLOR_PREFIX", raising=False)
    monkeypatch.setattr(worker, "print_to_stdstream", lambda data, ignore_prefix: printed.append(data))
    for _ in range(2):  # filters once
        connection._drop_raylet_noise()
    assert os.environ["RAY_COLOR_PREFIX"] == "0"  # no terminal here
    noise = [
        "3 PYTHON worker processes have been started",
        "Task _map_task failed. There are 3 retries remaining, so the task will be retried. Error: ",
    ]
    lines = [DEATH.format(pid=7), "disk is full", *noise, DEATH.format(pid=8)]
    worker.print_to_stdstream({"pid": "raylet", "lines": lines}, False)
    worker.print_to_stdstream({"pid": "raylet", "lines": [DEATH.format(pid=7)]}, ignore_prefix=False)
    assert printed == [{"pid": "raylet", "lines": ["disk is full"]}]
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" died; ")[0] for line in said] == [f"note: process {pid} on 192.0.2.2" for pid in (7, 8)]
    assert max(map(len, said)) < 220


def test_the_death_of_a_raylet_is_one_line_with_what_to_do(monkeypatch, capsys):
    import ray._private.worker as worker

    printed = []
    monkeypatch.setattr(worker, "print_to_stdstream", lambda data: printed.append(data))
    connection._drop_raylet_noise()
    for machine in (2, 3, 2):
        lines = ["Raylet is terminated. Termination is unexpected. Last 20 lines of the Raylet logs:", "[state-dump] x"]
        worker.print_to_stdstream({"pid": "raylet", "ip": f"192.0.2.{machine}", "lines": lines})
    assert printed == []
    assert capsys.readouterr().err == "".join(
        f"note: Ray's own process on 192.0.2.{machine} died. Killed for want of memory? `dmesg` tells. Where that is "
        "this machine, the run ends; what is finished is kept: run again\n"
        for machine in (2, 3)
    )
