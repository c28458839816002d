"""Triton's interpreter with a fraction of its work: most of it is spent on what it has worked out a moment ago.

Every operation makes types and shapes anew, checks them again, and passes through two wrappers; every call of a
function by a kernel prepares the language anew. Here each is done once and remembered; what is computed, and every
check that can fail, stays as it is. Whether integers overflow is seen where the kernels are tested by themselves
(`tests/kernels/conftest.py`); Triton would work everything out twice and then look only in its debug mode.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np

INTEGERS = {f"int{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (8, 16, 32, 64)}
INTEGERS |= {f"uint{bits}": (0, 2**bits - 1) for bits in (8, 16, 32, 64)}
FLOATS = ("fp32", "fp64")
OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
ALIKE = frozenset((*INTEGERS, *FLOATS))  # two of one of these need no conversion, whatever is done with them


def hasten() -> None:
    interpreter = importlib.import_module("triton.runtime.interpreter")
    core = importlib.import_module("triton.language.core")
    semantic = importlib.import_module("triton.language.semantic").TritonSemantic
    prepare_language_once(interpreter, core)
    remember_types(interpreter, core)
    skip_idle_conversions(semantic, core)
    semantic.binary_op_sanitize_overflow_impl = refuse_overflow
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)


def prepare_language_once(interpreter: ModuleType, core: ModuleType) -> None:
    """The language is prepared once for each module and launch, and its functions are looked up once."""
    launch, prepare, prepared = interpreter.GridExecutor.__call__, interpreter._patch_lang, set()
    wrapper = core.builtin(len).__code__  # asks for `_semantic` and passes everything on
    bound: dict[Any, list[tuple[str, Callable]]] = {}

    def launch_anew(executor, *args, **named):
        prepared.clear()
        return launch(executor, *args, **named)

    def call(function, *args, **named):
        module = function.fn.__module__
        if module not in prepared:
            prepare(function.fn)
            prepared.add(module)
        try:
            return function.rewrite()(*args, **named)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    def bind(member: Callable, semantic: object) -> Callable:
        inner = member.__wrapped__ if getattr(member, "__code__", None) is wrapper else member

        def run(*args, _semantic=None, **named):
            return inner(*args, _semantic=semantic, **named)

        return run

    def patch_builtins(package, builder, scope) -> None:
        if package not in bound:
            members = [(name, one) for name, one in inspect.getmembers(package) if core.is_builtin(one)]
            bound[package] = [(name, bind(one, interpreter.TritonSemantic(builder))) for name, one in members]
        for name, run in bound[package]:
            scope.set_attr(package, name, run)

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter.InterpretedFunction.__call__ = call
    interpreter._patch_builtin = patch_builtins


def remember_types(interpreter: ModuleType, core: ModuleType) -> None:
    """What there is to know about a type and a shape is found out once."""
    block, shapes, unwrap, numpy_of = core.block_type, core.tuple, core._unwrap_if_constexpr, interpreter._get_np_dtype
    describe, known = block.__init__, {}
    scalar_shape, scalar_size = shapes([]), core.constexpr(1)
    plain = frozenset((int, bool, float, str, type(None), core.tensor, core.dtype, core.pointer_type, block))

    def describe_block(self, element_ty, shape) -> None:
        sizes = tuple(shape.values if shape.__class__ is shapes else shape)
        facts = known.get((element_ty.name, sizes))
        if facts is None:
            describe(self, element_ty, shape)
            self.of_tensors = shapes([core.constexpr(size) for size in self.shape]), core.constexpr(self.numel)
            known[element_ty.name, sizes] = vars(self).copy()
        else:
            self.__dict__.update(facts)
            self.element_ty = element_ty

    def describe_tensor(self, handle, type) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.of_tensors if type.__class__ is block else (scalar_shape, scalar_size)

    def same(equal: Callable) -> Callable:
        return lambda self, other: self is other or equal(self, other)

    block.__init__, core.tensor.__init__ = describe_block, describe_tensor
    for kind in (core.dtype, core.pointer_type, block):
        kind.__eq__ = same(kind.__eq__)
    core._unwrap_if_constexpr = lambda value: value if value.__class__ in plain else unwrap(value)
    numpy_types: dict[str, Any] = {}

    def numpy_type(kind):
        found = numpy_types.get(kind.name)
        if found is None:
            found = numpy_types[kind.name] = numpy_of(kind)
        return found

    interpreter._get_np_dtype = numpy_type


def skip_idle_conversions(semantic: type, core: ModuleType) -> None:
    """Operands of one type, or of one shape, are as an operation wants them; so is a number that the type can hold."""
    check, broadcast = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value
    tensor, block = core.tensor, core.block_type

    def checked(self, lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False):
        if lhs.__class__ is tensor and rhs.__class__ is tensor:
            if lhs.dtype.name == rhs.dtype.name and lhs.dtype.name in ALIKE:
                return self.broadcast_impl_value(lhs, rhs)
        elif lhs.__class__ is tensor and arithmetic_check and holds(lhs.dtype.name, rhs):
            return self.broadcast_impl_value(lhs, self.scalar_constant(rhs, lhs.dtype))
        elif rhs.__class__ is tensor and arithmetic_check and holds(rhs.dtype.name, lhs):
            return self.broadcast_impl_value(self.scalar_constant(lhs, rhs.dtype), rhs)
        return check(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    def broadcasted(self, lhs, rhs):
        one, other = lhs.type, rhs.type
        if one.__class__ is block and other.__class__ is block:
            if one.shape.values == other.shape.values:
                return lhs, rhs
        elif one.__class__ is block:
            spread = block(other, one.shape)
            return lhs, tensor(self.builder.create_splat(spread, rhs.handle), spread)
        elif other.__class__ is block:
            spread = block(one, other.shape)
            return tensor(self.builder.create_splat(spread, lhs.handle), spread), rhs
        else:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value = checked, broadcasted


def refuse_overflow(semantic, lhs, rhs, operation: Callable) -> None:
    """AssertionError where a sum, difference or product of integers is not one of their type."""
    name = lhs.type.scalar.name
    if not semantic.builder.options.sanitize_overflow or name.endswith("64") or name not in INTEGERS:
        return
    wide = OPERATIONS[operation.__name__](lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
    lowest, highest = INTEGERS[name]
    fits = lowest <= wide.min() and wide.max() <= highest
    assert fits, f"{name} overflow detected for operation {operation.__name__}"


def holds(name: str, number: object) -> bool:
    """Whether a plain number beside a tensor of type `name` becomes one of that type without a question."""
    if number.__class__ is int and name in INTEGERS:
        lowest, highest = INTEGERS[name]
        return lowest <= number <= highest
    return name in FLOATS and (number.__class__ is float or number.__class__ is int and abs(number) < 2**31)
