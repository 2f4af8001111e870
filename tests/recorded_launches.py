"""What stands in for kernels in tests: it writes launches down, and what each would be taken to, and runs nothing."""

from typing import Any

from torch import Tensor

from longspan.backends.flash import plan

Launch = tuple[str, tuple[int, ...], tuple[Any, ...], dict[str, Any]]
LAUNCHES: list[Launch] = []
ALIGNED = 16
# Arguments after addresses of which nothing is compiled but their width, by kernel.
FREE = {
    "forward": {9, 10, 13, 14, *range(17, 23)}, "few": {9, 10, 13, 14, *range(17, 23), 26}, "few_merge": {0, 2, 4},
    "sequences": set(range(9)), "paged": {9, 12, 13, *range(18, 24), *range(27, 31)},
    "paged_merge": {2, 3, *range(7, 11)}, "hopper.forward": set(range(16)),
    "rows": set(range(16)), "spans": set(range(4)),
}  # fmt: skip


def specialised(name: str, numbers: tuple[Any, ...]) -> list[Any]:
    """What triton compiles for of the numbers that a kernel takes."""
    return [
        (not -(2**31) <= x < 2**31, *(() if i in FREE[name] else (x == 1, x % ALIGNED == 0))) if type(x) is int else x
        for i, x in enumerate(numbers)
    ]


class Bound:
    """Stands for a launch that can be repeated, and taken to other sizes; writes down what that launches."""

    def __init__(self, name: str, grid: tuple[int, ...], args: tuple[Any, ...], flags: dict[str, Any]) -> None:
        self.name, self.grid, self.flags = name, grid, flags
        self.count = next(i for i, x in enumerate(args) if isinstance(x, int | float))
        descriptors = {i: x for i, x in enumerate(args[: self.count]) if hasattr(x, "block_shape")}
        self.described = {i: (list(x.shape), list(x.strides)) for i, x in descriptors.items()}
        self.blocks = {i: tuple(x.block_shape) for i, x in descriptors.items()}
        self.none = [x is None for x in args[: self.count]]
        self.numbers = args[self.count :]

    def resized(self, grid: tuple[int, ...], numbers: tuple[Any, ...], *tensors: Tensor) -> "Bound":
        """Take it to other sizes, which must be compiled alike."""
        assert specialised(self.name, numbers) == specialised(self.name, self.numbers)
        other = object.__new__(Bound)
        vars(other).update(vars(self))
        other.grid, other.numbers = grid, numbers
        other.described = {i: plan.layout_described(tensors[i]) for i in self.described}
        return other

    def longer(self, numbers: tuple[Any, ...], tokens: int) -> "Bound":
        """Take it to more tokens."""
        assert specialised(self.name, numbers) == specialised(self.name, self.numbers)
        other = object.__new__(Bound)
        vars(other).update(vars(self), numbers=numbers)
        other.described = {
            i: ([*shape[:2], tokens, *shape[3:]], strides) for i, (shape, strides) in self.described.items()
        }
        return other

    def __call__(self, *addresses: int) -> bool:
        """Repeat it."""
        assert len(addresses) == self.count
        assert all(x % ALIGNED == 0 for x in addresses)
        if self.name not in {"sequences", "rows"}:  # of whose tensors some are none
            assert [x == 0 for x, none in zip(addresses, self.none, strict=True) if none] == [True] * sum(self.none)
        LAUNCHES.append((self.name, self.grid, told(self), self.flags))
        return True


def told(of: Bound) -> tuple[Any, ...]:
    """All of a launch but its grid, its flags and addresses."""
    return (*of.numbers, *of.described.items(), *of.blocks.items(), *of.none)


class Kernel:
    """Writes launches down and runs nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launched(*args: Any, **flags: Any) -> Bound | None:
            bound = Bound(self.name, grid, args, flags)
            LAUNCHES.append((self.name, grid, told(bound), flags))
            tensors = (getattr(x, "base", x) for x in args if x is not None)
            return bound if all(x.data_ptr() % ALIGNED == 0 for x in tensors if isinstance(x, Tensor)) else None

        return launched
