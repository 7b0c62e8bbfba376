"""The processes that quantize one model together, its ranks: what they tell each other, and that none of them hangs.

They are those that torchrun's environment variables name: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT,
which may be set by hand too. Without them a run is one process, and torch.distributed is not imported. Every sum over
ranks has a fixed order, so that the same ranks give the same bits. Tensors on GPUs travel by NCCL, all else by gloo.
"""

from __future__ import annotations

import contextlib
import datetime
import hmac
import ipaddress
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from .core.runtime import find_device
from .core.verbs import Array
from .errors import int_between, one_line, shown

if TYPE_CHECKING:
    import torch

JOIN_SECONDS = 300.0  # in which all ranks are there
_WORK = datetime.timedelta(days=30)  # one rank quantizes while the others wait; that it lives is seen by `_Watch`
_BEAT, _SILENCE = 1.0, 30.0  # seconds between two signs of life; after so many without one a rank is lost
_LEAVE = 5.0  # seconds in which a process that failed ends by itself
_LINE = 4096  # bytes of a message
_PIECE = 1 << 22  # numbers of a sum that one rank sends another at once
_SHOWN = 6  # differences in an error


class Group:
    """The ranks of a run, of which this process is number `rank` of `size`; one process alone is rank 0 of 1.

    All ranks call the same methods in the same order. Values are what JSON can hold. A method in which another rank is
    lost does not return: the process ends, or OSError is raised.
    """

    rank, size, local_rank = 0, 1, 0

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and writes files."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on each of them."""
        return [value]

    def broadcast(self, value: Any, root: int = 0) -> Any:
        """The value of rank `root`."""
        return value

    def broadcast_arrays(self, arrays: Mapping[str, Array] | None, root: int, device: Any) -> dict[str, Array]:
        """The arrays or tensors of rank `root`, by name; tensors are on `device`, unless they were on a CPU."""
        return dict(arrays or {})

    def sum_in_order(
        self, part: Array | None, ranks: Sequence[int], root: int, place: Callable[[], Array]
    ) -> Array | None:
        """The sum, on rank `root` alone, of the float64 parts of `ranks`, added one after another in this order.

        place: gives an array of the part's kind and shape, whose values are of no matter.
        """
        return part

    def sum_on(self, tensor: torch.Tensor, root: int) -> torch.Tensor | None:
        """The float32 sum, on rank `root` alone, of tensors of one shape and dtype, added in the order of the ranks."""
        return tensor

    def copy_from(self, tensors: Sequence[torch.Tensor], root: int) -> None:
        """Write the values of rank `root` into the contiguous tensors of the others, of the same shapes and dtypes."""

    def move(self, tensor: torch.Tensor, source: int, target: int) -> None:
        """Write the values of rank `source` into the contiguous tensor of rank `target`; only these two call this."""

    def gather_rows(self, rows: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
        """The rows [counts[rank], n] of all ranks, on each of them."""
        return [rows]

    def barrier(self, seconds: float) -> None:
        """Wait until all ranks are here; OSError after so many seconds."""

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Raise ValueError, on all ranks, saying which facts of a rank are others than those of rank 0."""
        first, *others = self.gather(json.loads(json.dumps(facts)))
        for rank, other in enumerate(others, 1):
            names = [name for name in dict.fromkeys((*first, *other)) if first.get(name) != other.get(name)]
            told = [f"{name}: {_short(first.get(name))} and {_short(other.get(name))}" for name in names[:_SHOWN]]
            told += [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
            if told:
                raise ValueError(f"ranks: got other values on 0 and {rank} ({'; '.join(told)}), expected the same run")


def _short(value: Any) -> str:
    """A hash need not be read to its end."""
    text = shown(value)
    return text if len(text) <= 40 else f"{text[:20]}..."


class _Group(Group):
    """Ranks that torch.distributed connects."""

    def __init__(self, rank: int, size: int, local_rank: int, watch: _Watch) -> None:
        import torch
        import torch.distributed

        self.rank, self.size, self.local_rank, self.watch = rank, size, local_rank, watch
        self._torch, self._of = torch, torch.distributed

    def gather(self, value: Any) -> list[Any]:
        data = self._encoded(value)
        counts = self._all(self._torch.tensor([len(data)]))
        padded = self._torch.zeros(int(max(counts)), dtype=self._torch.uint8)
        padded[: len(data)] = data
        found = zip(self._all(padded), map(int, counts), strict=True)
        return [json.loads(one[:count].numpy().tobytes()) for one, count in found]

    def broadcast(self, value: Any, root: int = 0) -> Any:
        data = self._encoded(value if self.rank == root else None)
        count = self._torch.tensor([len(data)])
        self._call(self._of.broadcast, count, root)
        if self.rank != root:
            data = self._torch.empty(int(count), dtype=self._torch.uint8)
        self._call(self._of.broadcast, data, root)
        return json.loads(data.numpy().tobytes())

    def broadcast_arrays(self, arrays: Mapping[str, Array] | None, root: int, device: Any) -> dict[str, Array]:
        torch, sent = self._torch, {}
        for name, array in (arrays or {}).items() if self.rank == root else ():
            sent[name] = torch.from_numpy(np.ascontiguousarray(array)) if isinstance(array, np.ndarray) else array
        facts = self.broadcast([[name, *self._facts(one, (arrays or {})[name])] for name, one in sent.items()], root)
        found: dict[str, Array] = {}
        for name, dtype, shape, kind in facts:
            place = device if kind == "device" else "cpu"
            if self.rank == root:
                tensor = sent[name].detach().contiguous()
            else:
                tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=place)
            if tensor.numel():
                self._call(self._of.broadcast, _bytes(tensor), root)
            found[name] = tensor.numpy() if kind == "numpy" else tensor
        return found

    def sum_in_order(
        self, part: Array | None, ranks: Sequence[int], root: int, place: Callable[[], Array]
    ) -> Array | None:
        own = None if part is None else self._torch.as_tensor(part)
        if own is not None and own.dtype != self._torch.float64:
            raise TypeError(f"part: got {own.dtype}, expected float64")
        if self.rank != root:
            if own is not None:
                self._send_pieces(own, root)
            return None
        assert ranks, "some rank has a part"
        found = place()
        self._sum_pieces(self._torch.as_tensor(found), own, ranks)
        return found

    def sum_on(self, tensor: torch.Tensor, root: int) -> torch.Tensor | None:
        if self.rank != root:
            self._send_pieces(tensor, root)
            return None
        total = self._torch.empty_like(tensor, dtype=self._torch.float32, memory_format=self._torch.contiguous_format)
        self._sum_pieces(total, tensor, range(self.size))
        return total

    def _send_pieces(self, part: torch.Tensor, root: int) -> None:
        values = part.reshape(-1)
        for at in range(0, values.numel(), _PIECE):
            self._call(self._of.send, _bytes(values[at : at + _PIECE]), root)

    def _sum_pieces(self, total: torch.Tensor, own: torch.Tensor | None, ranks: Sequence[int]) -> None:
        """Write the sum of the parts of `ranks`, which send theirs, into the contiguous total; own: this rank's."""
        parts, sums = None if own is None else own.reshape(-1), total.view(-1)
        received = sums.new_empty(min(_PIECE, sums.numel()), dtype=total.dtype if own is None else own.dtype)
        for at in range(0, sums.numel(), _PIECE):
            piece = sums[at : at + _PIECE]
            for n, rank in enumerate(ranks):
                one = received[: piece.numel()]
                if rank == self.rank:
                    assert parts is not None, "it is one of the ranks that have a part"
                    one = parts[at : at + _PIECE]
                else:
                    self._call(self._of.recv, _bytes(one), rank)
                (piece.add_ if n else piece.copy_)(one)

    def copy_from(self, tensors: Sequence[torch.Tensor], root: int) -> None:
        for tensor in tensors:
            self._call(self._of.broadcast, _bytes(tensor), root)

    def move(self, tensor: torch.Tensor, source: int, target: int) -> None:
        if self.rank == source:
            self._call(self._of.send, _bytes(tensor), target)
        else:
            self._call(self._of.recv, _bytes(tensor), source)

    def gather_rows(self, rows: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
        padded = rows.new_zeros((max(counts), rows.shape[1]))
        padded[: len(rows)] = rows
        return [one[:count] for one, count in zip(self._all(padded), counts, strict=True)]

    def barrier(self, seconds: float) -> None:
        here = self._torch.zeros(1)
        work = self._call(self._of.all_gather, [here.clone() for _ in range(self.size)], here, async_op=True)
        self._call(work.wait, datetime.timedelta(seconds=seconds))

    def _all(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        found = [self._torch.empty_like(tensor) for _ in range(self.size)]
        self._call(self._of.all_gather, found, tensor)
        return found

    def _encoded(self, value: Any) -> torch.Tensor:
        return self._torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=self._torch.uint8)

    @staticmethod
    def _facts(tensor: torch.Tensor, array: Array) -> tuple[str, list[int], str]:
        kind = "numpy" if isinstance(array, np.ndarray) else "cpu" if tensor.device.type == "cpu" else "device"
        return str(tensor.dtype).removeprefix("torch."), list(tensor.shape), kind

    def _call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """A rank that is lost is seen by `_Watch`, which then ends this process with one line."""
        try:
            return function(*args, **options)
        except RuntimeError as error:
            self.watch.wait(_LEAVE)
            raise OSError(f"ranks: rank {self.rank} of {self.size}: {one_line(error)}") from error


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory: no transport has all dtypes."""
    import torch

    return tensor.detach().view(-1).view(torch.uint8)


_group = Group()
_joined = _told = False


def told_elsewhere() -> bool:
    """Whether the first process of this machine says what is wrong: before the ranks are connected, since all have the
    same arguments; afterwards, since it has answered that it does.
    """
    try:
        _, size, local_rank = environment()
    except ValueError:  # which is what is to be said
        return False
    return size > 1 and local_rank > 0 and (_told or not _joined)


def local_size() -> int:
    """How many ranks share this machine's memory."""
    return _number("LOCAL_WORLD_SIZE", "1", 1, 4096) if group().size > 1 else 1


def group() -> Group:
    """The ranks of this run."""
    return _group


def environment() -> tuple[int, int, int]:
    """(rank, size, local rank) as the environment has them; (0, 1, 0) of one process alone. Raises ValueError naming
    a variable that is missing or no such number.
    """
    size = _number("WORLD_SIZE", "1", 1, 4096)
    if size == 1:
        return 0, 1, 0
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ValueError(f"{name}: missing, expected that of rank 0, since WORLD_SIZE is {size}")
    return _number("RANK", "", 0, size - 1), size, _number("LOCAL_RANK", "0", 0, size - 1)


def _number(name: str, default: str, low: int, high: int) -> int:
    text = os.environ.get(name, default)
    int_between(name, int(text) if text.isdecimal() and len(text) < 10 else text, low, high)
    return int(text)


def device_of_rank(name: str, argument: str = "device") -> torch.device:
    """`find_device` for this rank: of several on a machine each has a GPU of its own, the one of its LOCAL_RANK.

    Raises ValueError, naming `argument`, for one certain GPU, and for a rank without one.
    """
    _, size, local_rank = environment()
    if size == 1:
        return find_device(name, argument)
    if isinstance(name, str) and name.startswith("cuda:"):
        raise ValueError(f"{argument}: got {name!r} with WORLD_SIZE={size}, expected cuda, cpu or auto: each rank has "
                         "the GPU of its LOCAL_RANK")  # fmt: skip
    device = find_device(name, argument)
    if device.type != "cuda":
        return device
    import torch

    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK: got {local_rank}, expected less than {torch.cuda.device_count()}, the CUDA devices that are "
            "visible here: start fewer ranks"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


@contextlib.contextmanager
def started(on_lost: Callable[[str], NoReturn] | None = None) -> Iterator[Group]:
    """The ranks that the environment names, connected until the block is left; none leaves it before the others.

    on_lost: ends the process, within seconds, when another rank has ended or failed; it is called in another thread
    with a text that says which, and is empty where the first rank of this machine says it. None: one line on stderr,
    exit code 1. Raises ValueError as `environment` does, OSError if not all ranks are there within `JOIN_SECONDS`.
    """
    global _group, _joined, _told
    rank, size, local_rank = environment()
    if size == 1:
        yield _group
        return
    joined = _join(rank, size, local_rank, on_lost or _end)
    _group, _joined, _told = joined, True, False
    try:
        yield joined
        joined.barrier(_WORK.total_seconds())
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        joined.watch.tell("Ctrl-C" if interrupted else one_line(error))
        _told = local_rank > 0 and not interrupted and joined.watch.is_answered(_LEAVE)
        _end_later()
        raise
    else:
        joined.watch.close()
        import torch.distributed

        torch.distributed.destroy_process_group()
    finally:
        _group = Group()


def _end(text: str) -> NoReturn:
    if text:
        sys.stderr.write(f"aqlm-c: {text}\n")
        sys.stderr.flush()
    os._exit(1)


def _end_later() -> None:
    """A process that failed ends even if its threads still wait for others."""
    timer = threading.Timer(_LEAVE, os._exit, (2,))
    timer.daemon = True
    timer.start()


def _join(rank: int, size: int, local_rank: int, on_lost: Callable[[str], NoReturn]) -> _Group:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost rank is one line, said by us
    import torch
    import torch.distributed

    dist: Any = torch.distributed  # whose stubs leave out stores
    address = os.environ["MASTER_ADDR"]
    place, limit = f"{address}:{os.environ['MASTER_PORT']}", datetime.timedelta(seconds=JOIN_SECONDS)
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=limit))
        store = dist.PrefixStore("aqlm_c", store)
        watch = _Watch.connect(store, rank, size, address, on_lost)
        watch.speaks = local_rank == 0
        watch.start()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_WORK)
    except (RuntimeError, OSError, ValueError) as error:
        raise OSError(
            f"ranks: rank {rank} of {size} has no connection by way of {place} ({one_line(error)}), expected all ranks "
            f"within {JOIN_SECONDS:.0f} s"
        ) from error
    return _Group(rank, size, local_rank, watch)


class _Watch(threading.Thread):
    """A connection between rank 0 and each other rank, which ends with either of them: so ends all others.

    What a rank says, a line each: "." once a second, "bye" when it has finished, "stop TEXT" when it fails. Rank 0
    answers a "stop" with one to all. What ends a process first, its own failure or that of another rank, is what it
    says; it says nothing of what rank 0 has told, unless it `speaks`, as the first rank of each machine does.
    """

    speaks = True

    def __init__(self, rank: int, size: int, peers: Mapping[int, socket.socket], on_lost: Callable[[str], NoReturn]):
        super().__init__(daemon=True, name="ranks")
        self.rank, self.size, self.peers, self.on_lost = rank, size, dict(peers), on_lost
        self._lock, self._over = threading.Lock(), threading.Event()
        self._end, self._heard, self._answered = threading.Lock(), threading.Event(), False
        self._rest: dict[int, bytes] = dict.fromkeys(peers, b"")

    @classmethod
    def connect(cls, store: Any, rank: int, size: int, address: str, on_lost: Callable[[str], NoReturn]) -> _Watch:
        """Where rank 0 listens, and what a rank says to be known, is told through torch's store."""
        if rank:
            port, token = json.loads(store.get("watch"))
            own = socket.create_connection((address, port), timeout=JOIN_SECONDS)
            own.sendall(f"{token} {rank}\n".encode())
            if _first_line(own) != "all":  # until then rank 0 has others to wait for, and no beats to send
                raise OSError(f"ranks: rank 0 of {size} did not find all others within {JOIN_SECONDS:.0f} s")
            return cls(rank, size, {0: own}, on_lost)
        token = secrets.token_hex(16)
        peers: dict[int, socket.socket] = {}
        with _listen(address) as server:
            server.settimeout(JOIN_SECONDS)
            store.set("watch", json.dumps([server.getsockname()[1], token]))
            while len(peers) < size - 1:
                one, _ = server.accept()
                one.settimeout(10)
                said, _, number = _first_line(one).partition(" ")
                if hmac.compare_digest(said.encode(), token.encode()) and number.isdecimal():
                    peers[int(number)] = one
                else:
                    one.close()
        watch = cls(rank, size, peers, on_lost)
        watch._send(b"all\n")
        return watch

    def run(self) -> None:
        heard, next_beat = dict.fromkeys(self.peers, time.monotonic()), 0.0
        with selectors.DefaultSelector() as selector:
            for rank, peer in self.peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while not self._over.is_set() and self.peers:
                for key, _ in selector.select(_BEAT):
                    heard[key.data] = time.monotonic()
                    self._read(key.data, selector)
                if time.monotonic() >= next_beat:  # what is heard wakes this loop too
                    next_beat = time.monotonic() + _BEAT
                    self._send(b".\n")
                for rank in [rank for rank in self.peers if time.monotonic() - heard[rank] > _SILENCE]:
                    self._lost(f"rank {rank} of {self.size} has not been heard of for {_SILENCE:.0f} s")

    def tell(self, text: str) -> None:
        """Say that this rank fails, and why; what then becomes of the others is theirs.

        Where another rank's end came first this process ends, and nothing is said twice.
        """
        if not self._is_first_end():
            self.wait(_LEAVE)
        self._send(f"stop rank {self.rank} of {self.size} stopped: {text}".encode()[: _LINE - 1] + b"\n")

    def is_answered(self, seconds: float) -> bool:
        """Whether rank 0, that of another rank, says within so many seconds that it stops too."""
        self._heard.wait(seconds)
        return self._answered

    def wait(self, seconds: float) -> None:
        """Give the watch time to see, and to say, which rank is lost."""
        time.sleep(seconds)

    def close(self) -> None:
        """This rank has finished; the thread ends by itself."""
        self._over.set()
        self._send(b"bye\n")

    def _read(self, rank: int, selector: selectors.BaseSelector) -> None:
        try:
            data = self.peers[rank].recv(_LINE)
        except OSError:
            data = b""
        *lines, rest = (self._rest[rank] + data).split(b"\n")
        self._rest[rank] = rest[-_LINE:]
        for line in lines:
            if line.startswith(b"stop "):
                self._answered = True
                self._heard.set()
                self._lost(one_line(line[5:].decode(errors="replace")), told=True)
        if b"bye" in lines or not data:
            self._heard.set()
            selector.unregister(self.peers.pop(rank))
            if b"bye" not in lines:
                self._lost(f"rank {rank} of {self.size} was lost")

    def _lost(self, text: str, told: bool = False) -> None:
        """told: another rank has said so."""
        if self._over.is_set() or not self._is_first_end():
            return
        self._send(f"stop {text}".encode()[: _LINE - 1] + b"\n")
        self.on_lost(text if self.speaks or not told else "")

    def _is_first_end(self) -> bool:
        return self._end.acquire(blocking=False)

    def _send(self, data: bytes) -> None:
        with self._lock:
            for peer in list(self.peers.values()):
                with contextlib.suppress(OSError):  # what is gone is seen by reading
                    peer.sendall(data)


def _listen(address: str) -> socket.socket:
    """On the address of rank 0 alone, where it is one of this machine's; on all where a name that others know leads to
    the loopback, as a machine's own does on Debian.
    """
    try:
        family, *_, found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0]
        loops = ipaddress.ip_address(found[0]).is_loopback
        if loops and address != "localhost" and not _is_address(address):
            return socket.create_server(("", 0))
        return socket.create_server((address, 0), family=family)
    except OSError:
        return socket.create_server(("", 0))


def _is_address(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(text))
    return False


def _first_line(connection: socket.socket) -> str:
    data = b""
    with contextlib.suppress(OSError):
        while not data.endswith(b"\n") and len(data) < 100 and (more := connection.recv(1)):
            data += more
    return data.decode("ascii", errors="replace").strip()
