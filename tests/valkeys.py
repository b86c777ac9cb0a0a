"""Valkeys that belong together: a master with a replica and a Sentinel, or the nodes of a cluster.

They are started from jobq.embedded's program under its keeper, so that nothing outlives the test run; other than
jobq's own servers they listen at TCP ports of this machine, since a master, a replica and a node need an address.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from jobq.embedded.account import Account
from jobq.embedded.directory import RunDirectory, make_directory
from jobq.embedded.programs import Program, find_valkey
from jobq.embedded.valkey import Valkey
from jobq.errors import ConfigurationError

SERVICE = "main"
REPLICATION = ("replica", "on", ">secret", "+@all", "allchannels")
"""The user that a replica logs in as; without it the replica lags for as long as one likes."""
_STARTS = 5


class Node(Valkey):
    """A Valkey with a port; it keeps that port however often it is started again."""

    def __init__(self, home: Home, name: str, config: dict[str, str]):
        folder = home.run.path / name
        make_directory(folder, home.account)
        super().__init__(home.program, home.account, home.run, folder, durable=False)
        self._folder = folder
        self._settings = config
        self.port = 0

    @property
    def socket(self) -> Path:
        return self._folder / "socket"

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def begin(self) -> None:
        """Start it at a port that is free; one that somebody else takes first is given up."""
        for attempt in range(1, _STARTS + 1):
            self.port = _free_port()
            try:
                self.start()
            except ConfigurationError:
                if attempt == _STARTS:
                    raise
            else:
                break

    def client(self) -> redis.Redis:
        return redis.Redis(host="127.0.0.1", port=self.port, decode_responses=True, retry=Retry(NoBackoff(), 0))

    def ask(self, *command: object) -> Any:
        """Say one command to it, and return the reply."""
        with self.client() as client:
            return client.execute_command(*command)

    def raw(self, *command: object) -> Any:
        """The same, as the server says it."""
        with self.client() as client:
            client.response_callbacks.clear()
            return client.execute_command(*command)

    def pause(self) -> None:
        """SIGSTOP."""
        self._send(signal.SIGSTOP)

    def go_on(self) -> None:
        self._send(signal.SIGCONT)

    def _command(self, config: dict[str, str]) -> list[str]:
        return super()._command({"bind": "127.0.0.1", "port": str(self.port), **self._settings, **config})


class ClusterNode(Node):
    """A node of a cluster, whose bus has a port too."""

    bus = 0

    def begin(self) -> None:
        self.bus = _free_port()
        super().begin()

    @property
    def id(self) -> str:
        return str(self.ask("CLUSTER", "MYID"))

    def _command(self, config: dict[str, str]) -> list[str]:
        bus = {"cluster-enabled": "yes", "cluster-port": str(self.bus), "cluster-node-timeout": "1000"}
        return super()._command({**bus, **config})


class SentinelServer(Node):
    """A Sentinel that watches one master."""

    def watch(self, master: Node) -> None:
        monitored = (
            f"sentinel monitor {SERVICE} 127.0.0.1 {master.port} 1",
            f"sentinel down-after-milliseconds {SERVICE} 1000",
            f"sentinel failover-timeout {SERVICE} 4000",
        )
        self._file.write_text("\n".join(monitored) + "\n")
        self._account.own(self._file)
        self.begin()

    @property
    def _file(self) -> Path:
        return self._folder / "sentinel.conf"

    def _command(self, config: dict[str, str]) -> list[str]:
        settings = {"port": str(self.port), "bind": "127.0.0.1", "unixsocket": str(self.socket), "dir": str(self.data)}
        options = [word for name, value in settings.items() for word in (f"--{name}", value)]
        return [str(self._program.path), str(self._file), "--sentinel", *options]


class Home:
    """Where the servers of one block live."""

    def __init__(self, account: Account, run: RunDirectory, program: Program):
        self.account = account
        self.run = run
        self.program = program

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[Home]:
        account = Account.choose()
        run = RunDirectory.create(account)
        try:
            yield cls(account, run, find_valkey(account).made_reachable(account, run.path / "programs"))
        finally:
            run.remove()


class Watched:
    """A master, its replica and the Sentinel that watches them."""

    def __init__(self, nodes: tuple[Node, Node], sentinel: SentinelServer):
        self.nodes = nodes
        self.sentinel = sentinel

    @property
    def url(self) -> str:
        return f"redis+sentinel://127.0.0.1:{self.sentinel.port}/{SERVICE}"

    @property
    def master(self) -> Node:
        """Whom the Sentinel names."""
        _, port = self.sentinel.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)
        return next(node for node in self.nodes if node.port == int(port))

    @property
    def replica(self) -> Node:
        return next(node for node in self.nodes if node is not self.master)

    def is_whole(self) -> bool:
        """Whether the replica follows the master, and the Sentinel would promote it."""
        try:
            master, replica = self.master, self.replica
            roles = master.ask("ROLE")[0], replica.ask("ROLE")[0]
            link = replica.ask("INFO", "replication").get("master_link_status")
            told = self.sentinel.ask("SENTINEL", "MASTER", SERVICE)
            others = self.sentinel.ask("SENTINEL", "REPLICAS", SERVICE)
        except redis.RedisError:
            return False
        flags = [told["flags"], *(other["flags"] for other in others)]
        known = [other["port"] for other in others if other["master-link-status"] == "ok"]
        return (
            roles == ("master", "slave")
            and link == "up"
            and flags == ["master", "slave"]
            and known == [str(replica.port)]
        )

    def let_the_replica_lag(self) -> None:
        """From now on the replica hears nothing more of the master, which goes on."""
        self.master.ask("ACL", "SETUSER", "replica", "off")
        self.master.ask("CLIENT", "KILL", "TYPE", "replica")


class Cluster:
    """Nodes that share the slots evenly, without replicas."""

    def __init__(self, nodes: tuple[ClusterNode, ...]):
        self.nodes = nodes

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def owner(self, slot: int) -> ClusterNode:
        """Which node has a slot, as the nodes say it."""
        for first, last, (_, port, *_), *_ in self.nodes[0].raw("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(node for node in self.nodes if node.port == port)
        raise AssertionError(f"nobody has slot {slot}")

    def is_whole(self) -> bool:
        """Whether every node sees all others and all slots served."""
        try:
            told = [str(node.ask("CLUSTER INFO")) for node in self.nodes]
        except redis.RedisError:
            return False
        return all("cluster_state': 'ok'" in one and f"known_nodes': '{len(self.nodes)}'" in one for one in told)

    def keys(self) -> list[str]:
        """The names of all keys of all nodes."""
        return [name for node in self.nodes for name in node.ask("KEYS", "*")]

    def flush(self) -> None:
        for node in self.nodes:
            node.ask("FLUSHALL")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def watched() -> Iterator[Watched]:
    """Run a master, a replica and a Sentinel. They are whole a moment later."""
    settings = {"repl-diskless-sync-delay": "0", "masteruser": "replica", "masterauth": "secret"}
    with Home.open() as home, ExitStack() as stack:
        nodes = (Node(home, "a", settings), Node(home, "b", settings))
        for node in nodes:
            stack.callback(node.kill)
            node.begin()
            node.ask("ACL", "SETUSER", *REPLICATION)
        nodes[1].ask("REPLICAOF", *nodes[0].address)
        sentinel = SentinelServer(home, "s", {})
        stack.callback(sentinel.kill)
        sentinel.watch(nodes[0])
        yield Watched(nodes, sentinel)


@contextmanager
def cluster(nodes_wanted: int = 3) -> Iterator[Cluster]:
    """Run some nodes. They are whole a moment later."""
    with Home.open() as home, ExitStack() as stack:
        nodes = tuple(ClusterNode(home, name, {}) for name in "abc"[:nodes_wanted])
        for node in nodes:
            stack.callback(node.kill)
            node.begin()
        share = 16384 // len(nodes) + 1
        for index, node in enumerate(nodes):
            node.ask("CLUSTER", "ADDSLOTSRANGE", index * share, min((index + 1) * share, 16384) - 1)
            nodes[0].ask("CLUSTER", "MEET", *node.address, node.bus)
        yield Cluster(nodes)
