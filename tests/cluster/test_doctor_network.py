"""What `pipeline doctor` makes of RDMA ports, network cards and bandwidths; all of them are made up here."""

import importlib.util
import mmap
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.cluster.doctor import check_network, node_checks, node_hardware
from pipeline.cluster.doctor.node_checks import AllReduce
from pipeline.cluster.doctor.node_hardware import Links


class Host:
    """Files of a host below a folder, as Linux has them: class/* holds links to devices."""

    def __init__(self, folder: Path) -> None:
        self.sys, self.dev, self.proc = folder / "sys", folder / "dev", folder / "proc"
        self.write(self.proc / "sys/kernel/random/boot_id", "0b5c\n")

    @staticmethod
    def write(file: Path, content: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)

    def port(
        self, card: str, rate: str, state: str = "4: ACTIVE", link_layer: str = "InfiniBand", number: int = 1
    ) -> None:
        device = self.sys / "devices" / card
        for name, content in {"state": state, "rate": rate, "link_layer": link_layer}.items():
            self.write(device / f"ports/{number}/{name}", f"{content}\n")
        link = self.sys / "class/infiniband" / card
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(device)

    def card(self, name: str, speed: str, physical: bool = True) -> None:
        self.write(self.sys / "class/net" / name / "speed", f"{speed}\n")
        if physical:
            (self.sys / "class/net" / name / "device").mkdir()

    def links(self) -> Links:
        return node_hardware.links(self.sys, self.dev, self.proc)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.delenv("NCCL_IB_DISABLE", raising=False)
    monkeypatch.setattr(node_hardware, "_can_load", lambda _: True)
    return Host(tmp_path)


def test_active_ports_count_with_their_rates(host: Host) -> None:
    host.port("mlx5_0", "100 Gb/sec (4X EDR)", link_layer="Ethernet")
    host.port("mlx5_1", "400 Gb/sec (4X NDR)")
    host.port("mlx5_1", "400 Gb/sec (4X NDR)", state="1: DOWN", number=2)
    host.port("mlx5_2", "2.5 Gb/sec (1X SDR)", state="2: INIT")
    host.port("mlx5_3", "2.5 Gb/sec (1X SDR)")
    host.port("efa_0", "100 Gb/sec (4X EDR)", link_layer="Unknown")
    host.write(host.dev / "infiniband/uverbs0", "")
    assert host.links() == Links("0b5c", rdma=(400.0, 100.0, 2.5))


def test_what_a_container_lacks_to_use_its_hosts_ports(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.port("mlx5_0", "400 Gb/sec (4X NDR)")
    assert host.links().missing == ("/dev/infiniband/uverbs*",)
    monkeypatch.setattr(node_hardware, "_can_load", lambda name: name != "libibverbs.so.1")
    assert host.links().missing == ("libibverbs.so.1", "/dev/infiniband/uverbs*")


@pytest.mark.parametrize(("value", "off"), [("1", True), ("2", True), ("0", False), ("", False)])
def test_nccls_own_word_against_rdma(host: Host, monkeypatch: pytest.MonkeyPatch, value: str, off: bool) -> None:
    monkeypatch.setenv("NCCL_IB_DISABLE", value)
    assert host.links().is_rdma_off == off


def test_a_host_without_rdma_lacks_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_hardware, "_can_load", lambda _: False)
    assert host.links() == Links("0b5c")


def test_only_cards_that_say_their_speed_count(host: Host) -> None:
    host.card("eth0", "25000")
    host.card("eth1", "-1")  # virtio
    host.card("veth1", "10000", physical=False)
    (host.sys / "class/net/lo").mkdir()  # reading the speed of one that is down is an error
    assert host.links() == Links("0b5c", interface=25.0)


def test_this_machine_answers() -> None:
    assert node_hardware.links().host


IB8 = Links("1", rdma=(400.0,) * 8)


def two(links: Links, **changes: object) -> dict[str, Links]:
    """Nodes a and b, on a host each."""
    return {"a": replace(links, host="1"), "b": replace(links, host="2", **changes)}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("links", "names", "gb_per_s"),
    [
        (two(IB8), ["a"] * 8 + ["b"] * 8, 400.0),
        (two(IB8), ["a", "b"], 50.0),  # a GPU goes by the port near it
        (two(IB8, rdma=(100.0,)), ["a"] * 8 + ["b"] * 8, 12.5),
        (two(IB8, rdma=()), ["a"] * 8 + ["b"] * 8, 0.0),
        (two(IB8, is_rdma_off=True), ["a"] * 8 + ["b"] * 8, 0.0),
        (two(Links("", rdma=(400.0, 100.0))), ["a", "a", "b"], 50.0),
        ({**two(IB8), "c": IB8}, ["a"] * 4 + ["c"] * 4 + ["b"] * 8, 200.0),  # a and c are pods of one host
        ({**two(Links("", rdma=(400.0,))), "c": Links("1", rdma=(400.0,))}, ["a", "c", "b"], 25.0),
    ],
)
def test_what_rdma_could_carry(links: dict[str, Links], names: list[str], gb_per_s: float) -> None:
    assert check_network.rdma_gb_per_s(links, names) == gb_per_s


@pytest.mark.parametrize(
    ("links", "line"),
    [
        (two(Links("")), None),
        ({"a": IB8, "b": IB8}, None),  # one host
        ({"a": IB8}, None),  # the other has not answered
        (two(IB8), "ok  RDMA: active on a (8 ports, 3200 Gb/s), b (8 ports, 3200 Gb/s)"),
        (two(IB8, rdma=()), "ok  RDMA: active ports on a, but not on b"),
        (two(IB8, missing=("libibverbs.so.1",), is_rdma_off=True), "ok  RDMA: not used, as NCCL_IB_DISABLE says on b"),
        (
            two(IB8, missing=("libibverbs.so.1", "/dev/infiniband/uverbs*")),
            "bad RDMA: libibverbs.so.1 and /dev/infiniband/uverbs* missing on b, whose active ports have 3200 Gb/s; "
            "let NCCL use the hosts' RDMA: libibverbs in the image, ",
        ),
    ],
)
def test_rdma_that_a_container_cannot_use_is_bad(links: dict[str, Links], line: str | None) -> None:
    check = check_network.check_rdma(links, ["a", "a", "b", "b"])
    assert check is None if line is None else str(check).startswith(line)
    assert check is None or check.ok is not bool(check.fix)


def reduced(seconds: float, num_workers: int, network: str = "") -> list[AllReduce]:
    return [AllReduce(seconds / 2, network)] * (num_workers - 1) + [AllReduce(seconds, network)]


def test_bandwidth_is_that_of_a_ring() -> None:
    """64 MiB in 0.1 s over 4 workers: each link carries 2 * 3 / 4 of it."""
    check = check_network.check_all_reduce(reduced(0.1, 4), list("abcd"), "nccl", {})
    assert check.figures["algorithm_gb_per_s"] == pytest.approx(0.67108864)
    assert check.figures["bus_gb_per_s"] == pytest.approx(0.67108864 * 1.5)
    assert check.figures["gradients_s"] == pytest.approx(0.1 * 240_771_232 / 2**26)
    assert not check.ok
    assert check_network.check_all_reduce(reduced(0.1, 4), list("abcd"), "gloo", {}).ok
    assert check_network.check_all_reduce(reduced(0.01, 4), list("abcd"), "nccl", {}).ok


@pytest.mark.parametrize(
    ("bus", "network", "kind", "changes", "fix"),
    [
        (250.0, "IB", "nccl", {}, None),
        (250.0, "", "nccl", {}, None),
        (70.0, "IB", "nccl", {}, None),  # many hosts, for which 64 MiB are short
        (30.0, "Socket", "nccl", {}, "RDMA_FIX"),
        (60.0, "Socket", "nccl", {}, "RDMA_FIX"),  # by IP over InfiniBand
        (30.0, "", "nccl", {}, "RDMA_FIX"),
        (30.0, "IB", "nccl", {}, "PORTS_FIX"),
        (30.0, "Socket", "nccl", {"is_rdma_off": True}, None),
        (30.0, "Socket", "nccl", {"rdma": ()}, None),
        (0.5, "Socket", "nccl", {"rdma": ()}, "SLOW_FIX"),
        (0.5, "", "gloo", {}, None),
    ],
)
def test_tcp_is_bad_where_hosts_have_rdma(
    bus: float, network: str, kind: str, changes: dict[str, object], fix: str | None
) -> None:
    names = ["a"] * 8 + ["b"] * 8
    seconds = node_checks.ALL_REDUCE_BYTES * 2 * 15 / 16 / bus / 1e9
    check = check_network.check_all_reduce(reduced(seconds, 16, network), names, kind, two(IB8, **changes))
    assert check.ok == (fix is None)
    assert fix is None or check.fix == getattr(check_network, fix)
    assert ("; the hosts' RDMA could carry 400.00 GB/s" in check.text) == ("rdma_gb_per_s" in check.figures)
    assert (f"; NCCL uses {network}" in check.text) == bool(network)


@pytest.mark.parametrize(
    ("cards", "hosts", "told"), [((100, 25), 2, 3.125), ((100, 10), 2, None), ((100, 0), 2, None), ((100, 25), 1, None)]
)
@pytest.mark.parametrize("kind", ["nccl", "gloo"])
def test_what_a_network_card_could_do_is_told_only(
    cards: tuple[float, float], hosts: int, told: float | None, kind: str
) -> None:
    """1 GB/s between two nodes."""
    links = {"a": Links("1", interface=cards[0]), "b": Links(str(hosts), interface=cards[1])}
    seconds = node_checks.ALL_REDUCE_BYTES / 1e9
    check = check_network.check_all_reduce(reduced(seconds, 2), ["a", "b"], kind, links)
    assert check.ok
    assert check.figures.get("card_gb_per_s") == told
    assert check.text.endswith("; the network card of the slowest node could carry 3.12 GB/s") == bool(told)


def test_nccls_log_says_which_network_it_takes() -> None:
    lines = ["NET/IB : No device found.", "Using network {}", "ncclCommInitRank_impl comm 0x55d0c0 rank 0"]
    log = "".join(f"host:12:34 [0] NCCL INFO {line}\n" for line in lines)
    assert node_checks.network_of(log.format("Socket")) == "Socket"
    assert node_checks.network_of(log.format("AWS Libfabric")) == "AWS Libfabric"
    assert node_checks.network_of("NCCL version 2.30.7+cuda13.0\n") == ""


def test_the_installed_nccl_says_it_in_these_words() -> None:
    spec = importlib.util.find_spec("nvidia.nccl")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("torch is built without NCCL")
    library = Path(next(iter(spec.submodule_search_locations)), "lib/libnccl.so.2")
    with library.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
        assert content.find(b"Using network %s") >= 0
        assert content.find(b"NCCL_DEBUG_FILE") >= 0
