"""Flower as it is: its simulation on Ray, its deployment over loopback, plain and with TLS."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the extra flower")
pytest.importorskip("ray", reason="needs the extra flower")

from flwr.app import Context, RecordDict
from support import embedding
from support.embedding_pages import write
from support.flower_certificates import make_certificates
from support.flower_federation import make_server
from support.flower_processes import SECONDS, flower
from support.running import wait_for

pytestmark = pytest.mark.filterwarnings("ignore:the model is in train mode with dropout:UserWarning")
SIMULATION = "num-supernodes=4 client-resources-num-cpus=1 init-args-num-cpus=1"


def test_certificates_are_made_for_this_machine(tmp_path: Path) -> None:
    made = make_certificates(tmp_path / "tls")
    assert {path.name for path in made.iterdir()} == {"ca.pem", "server.key", "server.pem"}


@pytest.mark.slow
def test_the_simulation_on_ray(tmp_path: Path) -> None:
    with flower(tmp_path) as found:
        found.superlink("--simulation")
        ledger, text = found.run("support.flower_federation", "--federation-config", SIMULATION)
        assert ledger == embedding.reference_ledger()
        assert "held_out_loss" in text, "clients evaluate"
        assert not found.workers, "an actor of Ray stays itself"
    assert not found.processes()


@pytest.mark.slow
def test_the_deployment_of_the_page(tmp_path: Path) -> None:
    """A process for every message, a resident worker for every node."""
    write("flower", tmp_path, task="my_task.py")
    with flower(tmp_path) as found:
        found.superlink()
        for number in range(4):
            found.supernode(number)
        ledger, _ = found.run("my_federation")
        assert ledger == embedding.reference_ledger()
        assert sum(log.count("answered in") for log in found.workers) == 9
        assert [log.count("model loaded") for log in found.workers] == [1] * len(found.workers)
        assert 3 <= len(found.workers) <= 4
    assert not found.processes()


@pytest.mark.slow
def test_tls_a_wrong_certificate_and_a_node_that_is_killed(tmp_path: Path) -> None:
    """Client 2 trusts another authority; client 1's node is killed in the second round."""
    with flower(tmp_path, make_certificates(tmp_path / "tls")) as found:
        found.superlink()
        found.supernode(0)
        node = found.supernode(1)
        other = found.supernode(2, make_certificates(tmp_path / "other") / "ca.pem")

        def kill() -> None:
            wait_for((tmp_path / "hangs").exists, SECONDS)
            os.kill(node.pid, signal.SIGKILL)
            node.wait()

        killer = threading.Thread(target=kill)
        killer.start()
        ledger, text = found.run("support.flower_hanging", "-c", "num-rounds=2")
        killer.join()
        server = make_server(Context(1, 1, {}, RecordDict(), {}))
        for there in ([0, 1], [0]):
            opened = server.open([0, 1])
            for number in there:
                opened.add(number, embedding.make_client(number).handle(opened.message(number)))
            opened.close()
        assert ledger == server.ledger().to_bytes()
        assert "no answer of 1" in text
        other.terminate()
        other.wait(SECONDS)
        assert "CERTIFICATE_VERIFY_FAILED" in (tmp_path / "supernode-2.log").read_text()
    assert not found.processes()
