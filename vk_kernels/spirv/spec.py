"""The numbers of SPIR-V that are used here: each stands once, with the specification's name.

Source: the SPIR-V specification 1.6 and the extended instructions GLSL.std.450.
"""

from enum import IntEnum

MAGIC = 0x07230203


class Op(IntEnum):
    """Instructions, by their opcodes."""

    SOURCE = 3
    NAME = 5
    MEMBER_NAME = 6
    EXT_INST_IMPORT = 11
    EXT_INST = 12
    MEMORY_MODEL = 14
    ENTRY_POINT = 15
    EXECUTION_MODE = 16
    CAPABILITY = 17
    TYPE_VOID = 19
    TYPE_BOOL = 20
    TYPE_INT = 21
    TYPE_FLOAT = 22
    TYPE_VECTOR = 23
    TYPE_MATRIX = 24
    TYPE_ARRAY = 28
    TYPE_RUNTIME_ARRAY = 29
    TYPE_STRUCT = 30
    TYPE_POINTER = 32
    TYPE_FUNCTION = 33
    CONSTANT_TRUE = 41
    CONSTANT_FALSE = 42
    CONSTANT = 43
    SPEC_CONSTANT_TRUE = 48
    SPEC_CONSTANT_FALSE = 49
    SPEC_CONSTANT = 50
    SPEC_CONSTANT_OP = 52
    FUNCTION = 54
    FUNCTION_END = 56
    VARIABLE = 59
    LOAD = 61
    STORE = 62
    ACCESS_CHAIN = 65
    DECORATE = 71
    MEMBER_DECORATE = 72
    COMPOSITE_EXTRACT = 81
    F_TO_U = 109
    F_TO_S = 110
    S_TO_F = 111
    U_TO_F = 112
    U_CONVERT = 113
    BITCAST = 124
    F_NEGATE = 127
    I_ADD = 128
    F_ADD = 129
    I_SUB = 130
    F_SUB = 131
    I_MUL = 132
    F_MUL = 133
    U_DIV = 134
    S_DIV = 135
    F_DIV = 136
    U_MOD = 137
    U_MUL_EXTENDED = 151
    S_MUL_EXTENDED = 152
    LOGICAL_EQUAL = 164
    LOGICAL_NOT_EQUAL = 165
    LOGICAL_OR = 166
    LOGICAL_AND = 167
    LOGICAL_NOT = 168
    SELECT = 169
    I_EQUAL = 170
    I_NOT_EQUAL = 171
    U_GREATER = 172
    S_GREATER = 173
    U_GREATER_EQUAL = 174
    S_GREATER_EQUAL = 175
    U_LESS = 176
    S_LESS = 177
    U_LESS_EQUAL = 178
    S_LESS_EQUAL = 179
    F_EQUAL = 180
    F_NOT_EQUAL = 183  # unordered: NaN differs from everything
    F_LESS = 184
    F_GREATER = 186
    F_LESS_EQUAL = 188
    F_GREATER_EQUAL = 190
    SHIFT_RIGHT_LOGICAL = 194
    SHIFT_RIGHT_ARITHMETIC = 195
    SHIFT_LEFT = 196
    OR = 197
    XOR = 198
    AND = 199
    NOT = 200
    BIT_COUNT = 205
    CONTROL_BARRIER = 224
    PHI = 245
    LOOP_MERGE = 246
    SELECTION_MERGE = 247
    LABEL = 248
    BRANCH = 249
    BRANCH_CONDITIONAL = 250
    RETURN = 253
    EXECUTION_MODE_ID = 331


class Ext(IntEnum):
    """Instructions of GLSL.std.450. The accuracy of the others there is not enough for us, or left to the driver."""

    ROUND_EVEN = 2
    TRUNC = 3
    F_ABS = 4
    FLOOR = 8
    CEIL = 9
    SQRT = 31
    INVERSE_SQRT = 32
    U_MIN = 38
    S_MIN = 39
    U_MAX = 41
    S_MAX = 42
    FMA = 50
    FIND_U_MSB = 75


class Capability(IntEnum):
    """Capabilities, in the specification's spelling."""

    Shader = 1
    Float16 = 9
    Int64 = 11
    Int16 = 22
    GroupNonUniform = 61
    GroupNonUniformVote = 62
    GroupNonUniformArithmetic = 63
    GroupNonUniformBallot = 64
    GroupNonUniformShuffle = 65
    GroupNonUniformShuffleRelative = 66
    GroupNonUniformClustered = 67
    GroupNonUniformQuad = 68
    StorageBuffer16BitAccess = 4433
    StorageBuffer8BitAccess = 4448
    BFloat16TypeKHR = 5116
    BFloat16CooperativeMatrixKHR = 5118
    VulkanMemoryModel = 5345
    VulkanMemoryModelDeviceScope = 5346
    CooperativeMatrixReductionsNV = 5430
    CooperativeMatrixConversionsNV = 5431
    CooperativeMatrixPerElementOperationsNV = 5432
    CooperativeMatrixTensorAddressingNV = 5433
    TensorAddressingNV = 5439
    CooperativeMatrixKHR = 6022


class StorageClass(IntEnum):
    UNIFORM_CONSTANT = 0
    INPUT = 1
    UNIFORM = 2
    WORKGROUP = 4
    PUSH_CONSTANT = 9
    STORAGE_BUFFER = 12


class Decoration(IntEnum):
    SPEC_ID = 1
    BLOCK = 2
    ARRAY_STRIDE = 6
    BUILT_IN = 11
    ALIASED = 20
    NON_WRITABLE = 24
    BINDING = 33
    DESCRIPTOR_SET = 34
    OFFSET = 35
    NO_CONTRACTION = 42


class ExecutionMode(IntEnum):
    LOCAL_SIZE = 17
    LOCAL_SIZE_ID = 38


class BuiltIn(IntEnum):
    WORKGROUP_ID = 26
    LOCAL_INVOCATION_INDEX = 29


COMPUTE_MODEL = 5  # execution model GLCompute
WORKGROUP_SCOPE = 2
WORKGROUP_SEMANTICS = 0x108  # acquire, release; workgroup memory
