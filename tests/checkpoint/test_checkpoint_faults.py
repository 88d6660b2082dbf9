"""Faults: whatever happens to files, disks, clocks and processes, a checkpoint is whole or refused by a file's name."""

from __future__ import annotations

import errno
import io
import os
import pickle
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import safetensors.torch
import torch
from torch import nn

from lightning_gr.checkpoint import storage as storage_module
from lightning_gr.checkpoint.manifest import Manifest
from lightning_gr.checkpoint.reader import CheckpointReader, complete_checkpoints, newest_complete
from lightning_gr.checkpoint.storage import Storage
from lightning_gr.checkpoint.writer import (
    CheckpointWriter,
    pack,
    recommit,
    remove_checkpoint,
    remove_unfinished,
)

pytestmark = pytest.mark.dist

KILLED = 99


# ---- a run with all kinds of files -------------------------------------------------------------------------------


class Tables(pl.LightningModule):
    """A static table, and a dynamic one of which keys wait, come and go."""

    def __init__(self) -> None:
        super().__init__()
        from torchrec import EmbeddingCollection, EmbeddingConfig

        from lightning_gr.embeddings.dynamic import Admission, DynamicTableConfig, DynamicTables, TablePolicy

        table = EmbeddingConfig(name="fixed", num_embeddings=40, embedding_dim=4, feature_names=["a"])
        self.static = EmbeddingCollection(tables=[table], device=torch.device("cpu"))
        policy = TablePolicy(admission=Admission(min_count=2), ttl_steps=1)
        self.own = DynamicTables(virtual_shards=8, policy=policy).collection([DynamicTableConfig("own", 4, ["a"])])
        self.head = nn.Linear(8, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        found = [self.static(batch)["a"].values(), self.own(batch)["a"].values()]
        loss = self.head(torch.cat(found, 1)).square().sum()
        return {"loss": loss, "loss_sums": {"all": (loss, 1)}}

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class Batches:
    """Each rank's own ids."""

    def __init__(self, rank: int) -> None:
        from torchrec import KeyedJaggedTensor

        generator = torch.Generator().manual_seed(rank)
        ones = torch.ones(12, dtype=torch.int64)
        self.batches = [
            KeyedJaggedTensor(keys=["a"], values=torch.randint(0, 20, (12,), generator=generator) + 3 * x, lengths=ones)
            for x in range(7)
        ]

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class AfterStep(pl.Callback):
    def __init__(self, do: Callable[[Any], None]) -> None:
        self.do = do

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.do(trainer)


def fit(world_size: int, *callbacks: pl.Callback, steps: int = 4, ckpt_path: str | None = None) -> Tables:
    import torch.distributed as dist

    from lightning_gr.plugins import SequenceBalancedStrategy

    pl.seed_everything(1)
    module = Tables()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=world_size,
            strategy=SequenceBalancedStrategy(),
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_steps=steps,
        )
        fit.module = module  # type: ignore[attr-defined]  # for those who look after a failure
        trainer.fit(module, Batches(dist.get_rank()), ckpt_path=ckpt_path)
    return module


def rows_of(module: Tables) -> dict[int, list[float]]:
    (table,) = module.own.engine.tables  # type: ignore[union-attr]
    rows, _ = table.rows_of(0)
    used_N3 = torch.stack(rows.metadata[:3], 1)
    return {
        key: torch.cat([rows.values_ND[i], rows.state_NS[i], used_N3[i]]).tolist()
        for i, key in enumerate(rows.ids_N.tolist())
    }


def saved_rows(path: str | Path) -> dict[int, list[float]]:
    """As the files say."""
    from lightning_gr.embeddings.dynamic.table_files import read_table

    ((_, folders),) = CheckpointReader(path).collections().items()
    rows, _ = read_table(folders, "own")
    used_N3 = torch.stack(rows.metadata[:3], 1)
    return {
        key: torch.cat([rows.values_ND[i], rows.state_NS[i], used_N3[i]]).tolist()
        for i, key in enumerate(rows.ids_N.tolist())
    }


def save_some(world_size: int, folder: str) -> dict[int, list[float]]:
    """A full checkpoint, one that adds to it, one that adds to that, and a full one again."""
    from lightning_gr.plugins.save_options import SaveOptions

    def save(trainer: Any) -> None:
        number = trainer.global_step - 4
        if number > 0:
            trainer.save_checkpoint(f"{folder}/{number}.ckpt", storage_options=SaveOptions(full_every=3))

    return rows_of(fit(world_size, AfterStep(save), steps=8))


@pytest.fixture(scope="module")
def chain(gloo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    ranks = gloo(2).run(save_some, 2, str(folder))
    assert ranks[0] | ranks[1] == saved_rows(folder / "4.ckpt")
    assert [len(CheckpointReader(folder / f"{step}.ckpt").chain) for step in (1, 2, 3, 4)] == [1, 2, 3, 1]
    return folder


@pytest.fixture
def copy(chain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(chain, tmp_path / "copy"))


def files_in(folder: Path) -> list[str]:
    return sorted(str(x.relative_to(folder)) for x in folder.rglob("*") if x.is_file())


def test_the_checkpoints_have_every_kind_of_file(chain: Path) -> None:
    kinds = {Path(x).name.partition("-0")[0].removesuffix("_0.distcp") for x in files_in(chain / "3.ckpt")}
    assert kinds == {".metadata", "__0", "__1", "manifest.json", "meta.pt", "rank", "part", "waiting"}
    removed = 0
    for step in (2, 3):
        for path in (chain / f"{step}.ckpt").rglob("*.safetensors"):
            removed += len(safetensors.torch.load_file(path).get("removed", ()))
    assert removed > 0
    for step in (1, 2, 3, 4):
        CheckpointReader(chain / f"{step}.ckpt").verify()


def refused(path: Path) -> str:
    """Why a checkpoint, or one that it adds to, is refused; empty where it is not."""
    try:
        CheckpointReader(path).verify()
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return ""


# ---- files -------------------------------------------------------------------------------------------------------


def hurt(path: Path) -> list[tuple[str, bytes | None]]:
    """What may become of a file: its new contents, or None for its absence."""
    data = path.read_bytes()
    places = sorted({0, 1, len(data) // 3, len(data) // 2, len(data) - 1})
    flipped = [(f"byte {x} flipped", data[:x] + bytes([data[x] ^ 0x10]) + data[x + 1 :]) for x in places]
    return [
        ("missing", None),
        ("empty", b""),
        ("cut off", data[:-1]),
        ("longer", data + b"\0"),
        ("zeros", bytes(len(data))),
        *flipped,
    ]


def test_every_file_that_is_hurt_in_any_way_is_named(copy: Path) -> None:
    """Of the checkpoint itself, and of those that it adds to."""
    newest = copy / "3.ckpt"
    assert refused(newest) == ""
    for step in (1, 2, 3):
        for name in files_in(copy / f"{step}.ckpt"):
            path = copy / f"{step}.ckpt" / name
            whole = path.read_bytes()
            for how, data in hurt(path):
                if data is None:
                    path.unlink()
                else:
                    path.write_bytes(data)
                text = refused(newest)
                assert name in text, (path, how, text)
                assert f"{step}.ckpt" in text, (path, how, text)
                if how in ("missing", "empty", "cut off", "longer"):
                    found = newest_complete(copy)
                    assert found is not None
                    assert found.storage.name == "4.ckpt"
            path.write_bytes(whole)
    assert refused(newest) == ""


def test_any_single_byte_of_a_manifest(copy: Path) -> None:
    path = copy / "2.ckpt" / "manifest.json"
    whole, truth = path.read_bytes(), Manifest.read(Storage(copy / "2.ckpt"))
    survived, said = 0, set[str]()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = Manifest.read(Storage(copy / "2.ckpt"))
        except ValueError as error:
            said.add(str(error).partition(": ")[0])
        else:
            assert found == truth
            survived += 1
    assert said == {str(path)}
    assert survived < len(whole) // 10, "white space"
    for codec in ("utf-8-sig", "utf-16", "utf-16-le", "utf-32-le"):
        path.write_bytes(whole.decode().encode(codec))
        with pytest.raises(ValueError, match=r"manifest\.json: damaged"):
            Manifest.read(Storage(copy / "2.ckpt"))


def load_hurt(path: str, hurts: list[tuple[str, int]]) -> list[tuple[str, bool]]:
    """What the strategy says of a flipped byte in each file, and whether it left everything alone."""
    found = []
    for name, place in hurts:
        file = Path(path).parent / name
        whole = file.read_bytes()
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            fit(1, ckpt_path=path, steps=20)
            found.append(("", False))
        except ValueError as error:
            module: Any = fit.module  # type: ignore[attr-defined]
            pl.seed_everything(1)
            new = Tables()
            alone = not rows_of(module) and all(
                torch.equal(x, y) for x, y in zip(module.head.parameters(), new.head.parameters(), strict=True)
            )
            found.append((str(error), alone))
        file.write_bytes(whole)
    return found


def test_a_run_loads_nothing_of_what_is_damaged(gloo: Any, copy: Path) -> None:
    path = copy / "3.ckpt"
    names = [f"{step}.ckpt/{name}" for step in (1, 3) for name in files_in(copy / f"{step}.ckpt")]
    hurts = [(name, (copy / name).stat().st_size // 2) for name in names]
    (found,) = gloo(1).run(load_hurt, str(path), hurts)
    for (name, _), (text, alone) in zip(hurts, found, strict=True):
        assert name in text, (name, text)
        assert alone, name


def test_a_shard_of_another_checkpoint_is_no_shard_of_this_one(copy: Path) -> None:
    swapped = 0
    for name in files_in(copy / "4.ckpt"):
        mine, other = copy / "4.ckpt" / name, copy / "1.ckpt" / name
        if not other.exists() or mine.read_bytes() == other.read_bytes():
            continue
        whole = mine.read_bytes()
        mine.write_bytes(other.read_bytes())
        text = refused(copy / "4.ckpt")
        # With a manifest of the other one all other files are strangers.
        assert "4.ckpt/" in text, (name, text)
        assert name in text or name == "manifest.json"
        swapped += len(whole) == mine.stat().st_size
        mine.write_bytes(whole)
    assert swapped >= 3, "files of the same size"
    assert refused(copy / "4.ckpt") == ""


def load_rows(path: str) -> Any:
    try:
        return rows_of(fit(1, ckpt_path=path, steps=8))
    except ValueError as error:
        return str(error)


def test_strange_files_beside_are_left_out(gloo: Any, copy: Path) -> None:
    place = copy / "4.ckpt"
    truth = saved_rows(place)
    (part, *_) = place.rglob("part-00000-of-00002.safetensors")
    for name in ("part-00000-of-00003.safetensors", "part-00002-of-00002.safetensors", ".part.tmp", "removed-x"):
        shutil.copy(part, part.with_name(name))
        (found,) = gloo(1).run(load_rows, str(place))
        assert found in (truth, f"{part.parent}: files of 2 and of 3 processes (part-...); use another checkpoint"), (
            name
        )
        part.with_name(name).unlink()


# ---- chains ------------------------------------------------------------------------------------------------------


def test_without_what_it_adds_to_a_checkpoint_is_refused(gloo: Any, copy: Path) -> None:
    (copy / "1.ckpt").rename(copy / "away")
    for step in (2, 3):
        with pytest.raises(ValueError, match=r"2\.ckpt: adds to 1\.ckpt, which is not beside it"):
            CheckpointReader(copy / f"{step}.ckpt")
    CheckpointReader(copy / "4.ckpt").verify()
    (copy / "away").rename(copy / "1.ckpt")
    CheckpointReader(copy / "3.ckpt").verify()
    gloo(1).run(save_some, 1, str(copy / "other"))
    shutil.rmtree(copy / "1.ckpt")
    (copy / "other" / "1.ckpt").rename(copy / "1.ckpt")  # another save of this name, complete in itself
    CheckpointReader(copy / "1.ckpt").verify()
    with pytest.raises(ValueError, match=r"2\.ckpt: adds to another save than that which is now in .*1\.ckpt"):
        CheckpointReader(copy / "3.ckpt")


def rewrite(place: Path, **changed: Any) -> None:
    """A manifest that somebody made, with a checksum that fits."""
    from dataclasses import replace

    (place / "manifest.json").write_bytes(replace(Manifest.read(Storage(place)), **changed).to_bytes())


def test_a_chain_that_bites_its_tail_is_refused(copy: Path) -> None:
    from lightning_gr.checkpoint.manifest import Base

    ids = {step: Manifest.read(Storage(copy / f"{step}.ckpt")).id for step in (1, 2)}
    rewrite(copy / "1.ckpt", base=Base("1.ckpt", ids[1]))
    with pytest.raises(ValueError, match=r"1\.ckpt"):
        CheckpointReader(copy / "1.ckpt")
    rewrite(copy / "1.ckpt", base=Base("2.ckpt", ids[2]))
    with pytest.raises(ValueError, match=r"[12]\.ckpt"):
        CheckpointReader(copy / "2.ckpt")
    assert [x.storage.name for x in complete_checkpoints(copy)] == ["4.ckpt"]


# ---- what is no checkpoint ---------------------------------------------------------------------------------------


def test_foreign_places_are_refused_by_name(copy: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    with pytest.raises(FileNotFoundError, match=str(foreign)):
        CheckpointReader(foreign)
    foreign.mkdir()
    assert str(foreign) in refused(foreign)
    assert newest_complete(foreign) is None
    (foreign / "notes.txt").write_text("hello")
    assert str(foreign) in refused(foreign)
    single = tmp_path / "single.ckpt"
    torch.save({"state_dict": {}}, single)
    assert "a single file" in refused(single)
    # One of Lightning's own: shards and a commit mark, no manifest.
    (copy / "4.ckpt" / "manifest.json").unlink()
    assert "manifest.json" in refused(copy / "4.ckpt")
    for text in ("{}", "[]", "null", '{"format": "lightning-gr checkpoint 3"}', '{"files": 3}', "\udcff"):
        (copy / "4.ckpt" / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
        assert str(copy / "4.ckpt" / "manifest.json") in refused(copy / "4.ckpt")
    shutil.copy(copy / "1.ckpt" / "manifest.json", copy / "4.ckpt" / "manifest.json")
    assert "4.ckpt/" in refused(copy / "4.ckpt")


class Bomb:
    def __init__(self, trace: str) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("name", ["meta.pt", ".metadata", "rank-00000-of-00002.pt"])
@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_nothing_that_a_file_asks_for_is_run(gloo: Any, copy: Path, tmp_path: Path, name: str, how: str) -> None:
    bomb = Bomb(str(tmp_path / "trace"))
    path = copy / "4.ckpt" / name
    if how == "pickle":
        path.write_bytes(pickle.dumps({"global_step": bomb}))
    else:
        buffer = io.BytesIO()
        torch.save({"global_step": bomb}, buffer)
        path.write_bytes(buffer.getvalue())
    recommit(copy / "4.ckpt")  # as somebody would who wants it to be believed
    CheckpointReader(copy / "4.ckpt").verify()
    (text,) = gloo(1).run(load_refused, str(copy / "4.ckpt"))
    assert name in text, text
    assert not (tmp_path / "trace").exists()


def load_refused(path: str) -> str:
    try:
        fit(1, ckpt_path=path, steps=20)
    except ValueError as error:
        return str(error)
    return ""


# ---- clocks ------------------------------------------------------------------------------------------------------


def test_the_newest_is_not_a_matter_of_clocks(copy: Path) -> None:
    for step in (1, 2, 3, 4):
        for path in (*(copy / f"{step}.ckpt").rglob("*"), copy / f"{step}.ckpt"):
            os.utime(path, (1_000_000_000 - 1000 * step, 1_000_000_000 - 1000 * step))
    found = newest_complete(copy)
    assert found is not None
    assert found.storage.name == "4.ckpt"
    rewrite(copy / "4.ckpt", saved_at="1970-01-01T00:00:00+00:00")
    assert [x.storage.name for x in complete_checkpoints(copy)] == ["4.ckpt", "3.ckpt", "2.ckpt", "1.ckpt"]
    (copy / "4.ckpt" / "meta.pt").unlink()
    assert [x.storage.name for x in complete_checkpoints(copy)] == ["3.ckpt", "2.ckpt", "1.ckpt"]


# ---- full disks --------------------------------------------------------------------------------------------------


class Full:
    """Files of a disk that takes so many bytes more."""

    left = 1 << 60

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.file = open(*args, **kwargs)  # noqa: SIM115
        self.is_buffered = kwargs.get("buffering") != 0
        self.fileno, self.close, self.flush = self.file.fileno, self.file.close, self.file.flush
        self.read, self.readinto = self.file.read, getattr(self.file, "readinto", None)
        self.seek, self.tell = self.file.seek, self.file.tell

    def write(self, data: Any) -> int:
        taken = bytes(data)[: type(self).left]
        type(self).left -= len(taken)
        written: int = self.file.write(taken)
        if len(taken) < len(data) and (self.is_buffered or not taken):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *args: object) -> None:
        self.file.close()


def room_up_to_each(folder: Path, rank: int, world_size: int) -> list[int]:
    """Bytes after which the disk is full in the middle of each of the files that a process writes, in their order."""
    of_rank = f"{rank:05d}-of-{world_size:05d}"
    names = [f"__{rank}_0.distcp", ".metadata", f"rank-{of_rank}.pt", f"part-{of_rank}", f"waiting-{of_rank}"]
    sizes = [next(folder.rglob(f"{name}*")).stat().st_size for name in [*names, "manifest.json", "meta.pt"]]
    sizes = [sizes[0], *sizes[2:-2]] if rank > 0 else [80, *sizes]  # saving.json
    return [0] * (rank == 0) + [sum(sizes[:place]) + size // 2 for place, size in enumerate(sizes)]


def save_on_a_full_disk(world_size: int, folder: str, full_rank: int, background: bool) -> dict[str, Any]:
    """One run whose second step is saved again and again, with more room each time, and at last with enough."""
    import torch.distributed as dist

    from lightning_gr.plugins.save_options import SaveOptions

    said: list[str] = []
    options = SaveOptions(full_every=9, background=background)

    def save(trainer: Any) -> None:
        step = trainer.global_step
        rooms = room_up_to_each(Path(folder, "1.ckpt"), full_rank, world_size) if step == 2 else []
        for room in [*rooms, 1 << 60]:
            Full.left = room if dist.get_rank() == full_rank else 1 << 60
            try:
                trainer.save_checkpoint(f"{folder}/{step}.ckpt", storage_options=options)
                trainer.strategy.checkpoints.wait()
                said.append("")
            except OSError as error:
                said.append(str(error))
            dist.barrier()
            if dist.get_rank() == 0 and said[-1]:
                said[-1] += "" if os.listdir(folder) == ["1.ckpt"] else f" LEFT {os.listdir(folder)}"
            dist.barrier()

    storage_module.open = Full  # type: ignore[attr-defined]
    try:
        rows = rows_of(fit(world_size, AfterStep(save)))
    finally:
        del storage_module.open  # type: ignore[attr-defined]
        Full.left = 1 << 60
    return {"said": said, "rows": rows}


@pytest.mark.parametrize("background", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize(("world_size", "full_rank"), [(1, 0), (2, 0), (2, 1)])
def test_a_full_disk_costs_no_checkpoint(
    gloo: Any, tmp_path: Path, background: bool, world_size: int, full_rank: int
) -> None:
    ranks = gloo(world_size).run(save_on_a_full_disk, world_size, str(tmp_path), full_rank, background)
    said = ranks[full_rank]["said"]
    failed = [text for text in said if text]
    wanted = {"rank", "part", "waiting", f"__{full_rank}_0.distcp"}
    wanted |= {"saving.json", "meta.pt", "manifest.json", ".metadata"} if full_rank == 0 else set()
    named = {text.partition(": cannot be written")[0].split("/")[-1].split("-0")[0] for text in failed}
    assert named == wanted, failed
    for text in failed:
        assert "No space left" in text
        assert "LEFT" not in text, "nothing of the failed save stays, and nothing else goes"
    for rank in ranks:
        assert [bool(text) for text in rank["said"]] == [bool(text) for text in said], "all processes hear of it"
    for step in (1, 2, 3, 4):
        CheckpointReader(tmp_path / f"{step}.ckpt").verify()
    assert [len(CheckpointReader(tmp_path / f"{step}.ckpt").chain) for step in (1, 2, 3, 4)] == [1, 2, 3, 4]
    rows = {key: row for rank in ranks for key, row in rank["rows"].items()}
    assert saved_rows(tmp_path / "4.ckpt") == rows, "what failed saves have noted of removed rows is not lost"


# ---- killed at any moment ----------------------------------------------------------------------------------------


NAMES = [".metadata", "__0_0.distcp", "dynamic/own/part", "rank-00000-of-00001.pt"]


def small_save(target: Path, number: int) -> None:
    """A checkpoint in one process, by the means that the strategy has."""
    writer = CheckpointWriter(Storage(target))
    files = {NAMES[0]: writer.where.publish(NAMES[0], bytes([number]) * 50)}
    for name in NAMES[1:]:
        with writer.where.create(name) as file:
            file.write(bytes([number]) * 1000)
        files[name] = file.sum
    writer.commit(pack({"global_step": number}), files, step=number, epoch=0, world_size=1)


def number_of(path: Path | Storage) -> int:
    """Which save a checkpoint is; all of it is of one."""
    reader = CheckpointReader(path)
    reader.verify()
    number = reader.manifest.step
    assert {x for name in NAMES for x in reader.storage.read_bytes(name)} == {number}
    assert reader.meta() == {"global_step": number}
    return number


def dies_at(moment: int, do: Callable[[], object]) -> bool:
    """Does something in a process that is killed before it touches the disk for the so many-th time."""
    child = os.fork()
    if child == 0:
        left = moment

        def count(event: str, args: tuple[Any, ...]) -> None:
            nonlocal left
            writes = event == "open" and isinstance(args[1], str) and "w" in args[1]
            if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "touch"):
                left -= 1
                if left < 0:
                    os._exit(KILLED)

        try:
            write = storage_module.SummedFile.write

            def counted(file: Any, data: Any) -> int:
                half = len(memoryview(data).cast("B")) // 2
                sys.audit("touch")
                view = memoryview(data).cast("B")
                write(file, view[:half])
                sys.audit("touch")
                return half + write(file, view[half:])

            storage_module.SummedFile.write = counted  # type: ignore[method-assign]
            sys.addaudithook(count)
            do()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


def moments(do: Callable[[int], bool]) -> int:
    moment = 0
    while do(moment):
        moment += 1
    return moment


def test_killed_in_a_first_save_at_any_moment(tmp_path: Path) -> None:
    def once(moment: int) -> bool:
        folder = tmp_path / str(moment)
        small_save(folder / "1.ckpt", 1)
        killed = dies_at(moment, lambda: small_save(folder / "2.ckpt", 2))
        found = newest_complete(folder)
        assert found is not None
        assert number_of(found.storage) in ((1, 2) if killed else (2,)), moment
        assert number_of(folder / "1.ckpt") == 1
        # The next run clears what is unfinished, and saves under the same name.
        remove_unfinished(Storage(folder))
        assert {x.partition("/")[0] for x in files_in(folder)} <= {"1.ckpt", "2.ckpt"}
        small_save(folder / "2.ckpt", 3)
        assert number_of(folder / "2.ckpt") == 3, moment
        shutil.rmtree(folder)
        return killed

    assert moments(once) > 20


def test_killed_in_saving_over_a_checkpoint_at_any_moment(tmp_path: Path) -> None:
    def once(moment: int) -> bool:
        folder = tmp_path / str(moment)
        small_save(folder / "last.ckpt", 1)
        killed = dies_at(moment, lambda: small_save(folder / "last.ckpt", 2))
        found = newest_complete(folder)
        assert found is not None, moment
        assert number_of(found.storage) in ((1, 2) if killed else (2,)), moment
        if (folder / "last.ckpt").exists():
            assert number_of(folder / "last.ckpt") in (1, 2), moment
        newest = number_of(found.storage)
        remove_unfinished(Storage(folder))
        found = newest_complete(folder)
        assert found is not None
        assert number_of(found.storage) == newest, "clearing up has cleared no complete one"
        small_save(folder / "last.ckpt", 3)
        assert number_of(folder / "last.ckpt") == 3, moment
        found = newest_complete(folder)
        assert found is not None
        assert number_of(found.storage) == 3, moment
        shutil.rmtree(folder)
        return killed

    assert moments(once) > 25


def test_killed_in_removing_at_any_moment(tmp_path: Path) -> None:
    def once(moment: int) -> bool:
        folder = tmp_path / str(moment)
        for number in (1, 2):
            small_save(folder / f"{number}.ckpt", number)
        killed = dies_at(moment, lambda: remove_checkpoint(Storage(folder / "2.ckpt")))
        found = newest_complete(folder)
        assert found is not None
        assert number_of(found.storage) in ((1, 2) if killed else (1,)), moment
        if killed and found.manifest.step == 1:
            assert refused(folder / "2.ckpt"), "a part of one is none"
            remove_unfinished(Storage(folder))
            assert files_in(folder) == [f"1.ckpt/{x}" for x in files_in(folder / "1.ckpt")], "the rest can be cleared"
            small_save(folder / "2.ckpt", 3)
            assert number_of(folder / "2.ckpt") == 3
        shutil.rmtree(folder)
        return killed

    assert moments(once) > 5


def test_killed_while_an_unfinished_save_is_cleared(tmp_path: Path) -> None:
    def once(moment: int) -> bool:
        folder = tmp_path / str(moment)
        small_save(folder / "1.ckpt", 1)
        assert dies_at(18, lambda: small_save(folder / "2.ckpt", 2)), "a save that is cut off in its middle"
        assert refused(folder / "2.ckpt")
        killed = dies_at(moment, lambda: remove_unfinished(Storage(folder)))
        remove_unfinished(Storage(folder))
        assert files_in(folder) == [f"1.ckpt/{x}" for x in files_in(folder / "1.ckpt")], moment
        assert number_of(folder / "1.ckpt") == 1
        shutil.rmtree(folder)
        return killed

    assert moments(once) > 3


@pytest.mark.parametrize("over", [False, True])
def test_a_folder_that_is_swept_just_as_a_save_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over: bool
) -> None:
    """By a run that goes on from there: it names what is complete, whichever of the two comes first."""
    if over:
        small_save(tmp_path / "1.ckpt", 1)
    rename, swept = storage_module.Storage.rename_to, []

    def sweeping(self: Storage, name: str) -> None:
        if not swept:
            swept.append(name)
            remove_unfinished(Storage(tmp_path))
        rename(self, name)

    monkeypatch.setattr(storage_module.Storage, "rename_to", sweeping)
    small_save(tmp_path / "1.ckpt", 2)
    assert swept
    assert number_of(tmp_path / "1.ckpt") == 2
    assert [x.name for x in tmp_path.iterdir()] == ["1.ckpt"]


def test_a_save_that_another_run_has_removed_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = storage_module.Storage.rename_to

    def removing(self: Storage, name: str) -> None:
        remove_checkpoint(self)
        rename(self, name)

    monkeypatch.setattr(storage_module.Storage, "rename_to", removing)
    with pytest.raises(FileNotFoundError):
        small_save(tmp_path / "1.ckpt", 2)


def test_a_full_disk_can_be_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        small_save(tmp_path / f"{number}.ckpt", number)
    monkeypatch.setattr(storage_module, "open", Full, raising=False)
    monkeypatch.setattr(Full, "left", 0)
    remove_checkpoint(Storage(tmp_path / "1.ckpt"))
    assert [x.name for x in tmp_path.iterdir()] == ["2.ckpt"]


def test_names_that_are_taken_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("notes", "file"):
        with pytest.raises(FileExistsError, match=str(tmp_path / name)):
            small_save(tmp_path / name, 1)
    assert (tmp_path / "notes" / "a.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert files_in(tmp_path) == ["file", "notes/a.txt"]
    (tmp_path / "empty").mkdir()
    small_save(tmp_path / "empty", 1)
    assert number_of(tmp_path / "empty") == 1


def test_a_link_of_that_name_is_replaced_and_not_followed(tmp_path: Path) -> None:
    small_save(tmp_path / "1.ckpt", 1)
    (tmp_path / "last.ckpt").symlink_to("1.ckpt")
    small_save(tmp_path / "last.ckpt", 2)
    assert (number_of(tmp_path / "1.ckpt"), number_of(tmp_path / "last.ckpt")) == (1, 2)
