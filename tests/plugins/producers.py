"""A producer that makes a generation in a thread of the trainer's own process, the last part first."""

import threading

from npd.generations.producer import Beside
from npd.registry import PRODUCERS


class InAThread(Beside):
    """Parts land while the trainer trains on those before them."""

    elsewhere = True  # it is chosen by name, not by devices
    thread: threading.Thread | None = None
    failed: BaseException | None = None

    def begin(self, generation: int) -> None:
        super().begin(generation)
        self.thread = threading.Thread(target=self.make, args=(sorted(self.shop.books.missing(generation))[::-1], generation))
        self.thread.start()

    def make(self, parts: list[int], generation: int) -> None:
        try:
            self.shop.make_parts(generation, parts)
        except BaseException as error:
            self.failed = error

    def want(self, generation: int, part: int) -> None:
        if self.thread is None or not self.thread.is_alive():
            self.make([part], generation)

    def check(self) -> None:
        if self.failed is not None:
            raise self.failed

    def close(self) -> None:
        if self.thread is not None:
            self.thread.join()


PRODUCERS.register("in_a_thread", InAThread)
