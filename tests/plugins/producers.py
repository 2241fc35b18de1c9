"""A producer that makes each part when the trainer asks for it, in the trainer's own process."""

from npd.generations.producer import Beside
from npd.registry import PRODUCERS


class OneByOne(Beside):
    """Training begins after a generation's first part, not after its last one."""

    elsewhere = True  # placement.rollout has its name, and no devices

    def landed(self, generation: int, taken: list[int]) -> int | None:
        part = min(set(range(len(self.shop.generations.parts(generation)))) - set(taken))
        if part in self.shop.books.missing(generation):
            self.want(generation, part)
        return part

    def want(self, generation: int, part: int) -> None:
        with self.shop.room():  # the trainer's models leave a GPU that is shared
            self.shop.make_parts(generation, [part])
            self.shop.pipeline.models.release()


PRODUCERS.register("one_by_one", OneByOne)
