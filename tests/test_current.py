"""The mapper that is chosen once: where it holds, and that workers start no workers."""

import asyncio
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.pool import ThreadPool

import emcee
import joblib
import numpy as np
import pytest
from deap import algorithms, base, creator, tools

from taskcarrier import (
    DynamicParallelMapper,
    MapperInstance,
    SerialMapper,
    StaticParallelMapper,
    current_mapper,
    map_items,
    use_mapper,
)
from tests.strategies import run_script


@pytest.fixture(autouse=True)
def nothing_registered():
    yield
    MapperInstance().register_mapper(SerialMapper())


def kind_inside(_=None):
    return type(current_mapper()).__name__


class TestUseMapper:
    def test_use_mapper_holds_in_its_block(self):
        mapper = DynamicParallelMapper(2)
        with use_mapper(mapper) as same:
            assert same is mapper
            assert current_mapper() is mapper
        assert isinstance(current_mapper(), SerialMapper)

    def test_the_innermost_mapper_counts(self):
        outer, inner = StaticParallelMapper(2), DynamicParallelMapper(2)
        with use_mapper(outer):
            with suppress(ZeroDivisionError), use_mapper(inner):
                assert current_mapper() is inner
                raise ZeroDivisionError
            assert current_mapper() is outer

    def test_the_current_mapper_is_used_deep_inside(self):
        def deep(words):
            return current_mapper()(str.upper, words)

        with use_mapper(DynamicParallelMapper(2, backend="threading")) as mapper:
            assert deep(["a", "b"]) == ["A", "B"]
            assert mapper.report.backend == "threading"

    def test_use_mapper_holds_in_its_own_thread_only(self):
        seen = []
        with use_mapper(DynamicParallelMapper(2)):
            thread = threading.Thread(target=lambda: seen.append(kind_inside()))
            thread.start()
            thread.join()
        assert seen == ["SerialMapper"]

    def test_use_mapper_holds_in_tasks_of_asyncio(self):
        async def inside():
            return kind_inside()

        with use_mapper(DynamicParallelMapper(2)):
            assert asyncio.run(inside()) == "DynamicParallelMapper"

    def test_use_mapper_refuses_what_is_no_mapper(self):
        with pytest.raises(TypeError, match="needs a SerialMapper"), use_mapper(map):
            pass


class TestInsideWorkers:
    @pytest.mark.parametrize("backend", ["threading", "loky"])
    def test_the_current_mapper_is_serial_inside_our_workers(self, backend):
        mapper = StaticParallelMapper(2, backend=backend)
        MapperInstance().register_mapper(mapper)
        with use_mapper(mapper):
            assert set(current_mapper()(kind_inside, range(8))) == {"SerialMapper"}

    @pytest.mark.parametrize("backend", ["threading", "loky"])
    def test_the_current_mapper_is_serial_inside_workers_of_joblib(self, backend, tmp_path):
        code = """
import sys
import joblib
from taskcarrier import StaticParallelMapper, current_mapper, use_mapper
def kind_inside(n): return type(current_mapper()).__name__
with use_mapper(StaticParallelMapper(2)):
    tasks = [joblib.delayed(kind_inside)(n) for n in range(4)]
    found = joblib.Parallel(2, backend=sys.argv[1])(tasks)
print(*set(found))
"""
        assert run_script(tmp_path, code, backend) == "SerialMapper\n"

    def test_no_more_threads_are_started_than_there_are_workers(self):
        def count(_):
            current_mapper()(abs, range(100))
            joblib.Parallel(4)(joblib.delayed(abs)(n) for n in range(10))
            return threading.active_count()

        with use_mapper(DynamicParallelMapper(2, backend="threading")):
            before = threading.active_count()
            assert map_items(count, np.arange(8), n_jobs=2, backend="threading").max() <= before + 3


class TestMapperInstance:
    def test_there_is_one_mapper_instance(self):
        assert MapperInstance() is MapperInstance()

    def test_the_mapper_instance_gives_the_registered_mapper(self):
        mapper = StaticParallelMapper(2, backend="threading")
        MapperInstance().register_mapper(mapper)
        assert MapperInstance().retrieve_mapper() is mapper
        with MapperInstance() as same:
            assert same is mapper
            assert same.map(pow, [2, 3], [2, 2]) == [4, 9]
        assert current_mapper() is mapper

    def test_the_mapper_instance_is_serial_inside_itself(self):
        MapperInstance().register_mapper(StaticParallelMapper(2))
        with MapperInstance():
            with MapperInstance() as inner:
                assert isinstance(inner, SerialMapper)
            with MapperInstance() as again:
                assert isinstance(again, SerialMapper)
        with MapperInstance() as outside:
            assert isinstance(outside, StaticParallelMapper)

    def test_the_mapper_instance_lets_exceptions_pass(self):
        MapperInstance().register_mapper(StaticParallelMapper(2))
        with pytest.raises(ZeroDivisionError), MapperInstance():
            raise ZeroDivisionError
        with MapperInstance() as mapper:
            assert isinstance(mapper, StaticParallelMapper)


class TestOtherLibraries:
    @pytest.mark.thorough
    def test_differential_evolution_of_scipy_takes_a_mapper(self):
        optimize = pytest.importorskip("scipy.optimize", reason="SciPy is optional")
        options = {"seed": 1, "updating": "deferred", "maxiter": 5}
        bounds = [(-2, 2)] * 2
        serial = optimize.differential_evolution(optimize.rosen, bounds, **options)
        for kind in (StaticParallelMapper, DynamicParallelMapper):
            mapper = kind(2, backend="loky")
            ours = optimize.differential_evolution(
                optimize.rosen, bounds, workers=mapper, **options
            )
            assert np.array_equal(ours.x, serial.x)
            assert ours.fun == serial.fun

    @pytest.mark.thorough
    def test_brute_of_scipy_takes_a_mapper(self):
        optimize = pytest.importorskip("scipy.optimize", reason="SciPy is optional")
        options = {"ranges": [(-2, 2)] * 2, "Ns": 8, "finish": None}
        serial = optimize.brute(optimize.rosen, **options)
        ours = optimize.brute(
            optimize.rosen, workers=DynamicParallelMapper(2, backend="loky"), **options
        )
        assert np.array_equal(ours, serial)

    @pytest.mark.one_case
    @pytest.mark.parametrize("backend", ["threading", "loky"])
    def test_emcee_takes_a_mapper_as_its_pool(self, backend):
        def log_density(point):
            return -0.5 * float((point**2).sum())

        def chain(pool):
            sampler = emcee.EnsembleSampler(8, 3, log_density, pool=pool)
            sampler.random_state = np.random.RandomState(3).get_state()  # its own
            sampler.run_mcmc(np.random.default_rng(0).normal(size=(8, 3)), 20)
            return sampler.get_chain()

        serial = chain(None)
        assert len(np.unique(serial)) > 100
        with DynamicParallelMapper(2, backend=backend) as pool:
            assert np.array_equal(chain(pool), serial)
            assert (pool.report.backend, pool.report.items) == (backend, 4)

    @pytest.mark.parametrize("backend", ["threading", "loky"])
    def test_the_toolbox_of_deap_takes_a_mapper(self, backend):
        # As its own introduction does, where classes are made at run time.
        creator.create("TaskcarrierFitness", base.Fitness, weights=(1.0,))
        creator.create("TaskcarrierGenes", list, fitness=creator.TaskcarrierFitness)
        toolbox = base.Toolbox()
        toolbox.register("bit", random.randint, 0, 1)
        toolbox.register("genes", tools.initRepeat, creator.TaskcarrierGenes, toolbox.bit, 20)
        toolbox.register("population", tools.initRepeat, list, toolbox.genes)
        toolbox.register("evaluate", lambda genes: (sum(genes),))
        toolbox.register("mate", tools.cxTwoPoint)
        toolbox.register("mutate", tools.mutFlipBit, indpb=0.05)
        toolbox.register("select", tools.selTournament, tournsize=3)

        def evolved(map_like):
            random.seed(4)
            toolbox.register("map", map_like)
            population, _ = algorithms.eaSimple(
                toolbox.population(n=20), toolbox, 0.5, 0.2, ngen=4, verbose=False
            )
            return [(list(genes), genes.fitness.values) for genes in population]

        try:
            mapper = DynamicParallelMapper(2, backend=backend)
            assert evolved(mapper.map) == evolved(map)
            assert mapper.report.backend == backend
        finally:
            del creator.TaskcarrierFitness, creator.TaskcarrierGenes

    @pytest.mark.parametrize("kind", [SerialMapper, StaticParallelMapper, DynamicParallelMapper])
    def test_code_written_for_an_executor_takes_a_mapper(self, kind):
        def table(executor):
            with executor as inside:
                squares = inside.map(pow, range(30), [2] * 25, timeout=None, chunksize=7)
                lengths = inside.map(len, ("a", "bc"), chunksize=1)
                return dict(enumerate(squares)), [*lengths], sorted(inside.map(abs, {-1, 2}))

        with kind(2, backend="threading") as mapper:
            assert table(mapper) == table(ThreadPoolExecutor(2))
        assert not hasattr(mapper, "submit")  # a mapper maps

    @pytest.mark.parametrize("kind", [SerialMapper, StaticParallelMapper, DynamicParallelMapper])
    def test_code_written_for_a_pool_takes_a_mapper(self, kind):
        def lines(pool):
            with pool:
                return pool.map(hex, range(30)) + pool.map(hex, iter([1, 2]), chunksize=2)

        assert lines(kind(2, backend="threading")) == lines(ThreadPool(2))
