#!/usr/bin/env bash
# Makes gpt_jax/runs/page_files/echarts.min.js: the charts that a report has, of Apache ECharts, in one file without a
# network. The whole of ECharts is 1.1 MB, and this part 0.63. Needs node and npm.
set -euo pipefail
ECHARTS=6.1.0 ESBUILD=0.28.2
target="$(cd "$(dirname "$0")/.." && pwd)/gpt_jax/runs/page_files"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
npm install --silent --no-audit --no-fund "echarts@$ECHARTS" "esbuild@$ESBUILD"
cat > charts.js <<'END'
import { use } from "echarts/core";
import { BarChart, HeatmapChart, LineChart, ScatterChart } from "echarts/charts";
import {
  DataZoomInsideComponent, DataZoomSliderComponent, GridComponent, LegendComponent, TooltipComponent,
  VisualMapContinuousComponent,
} from "echarts/components";
import { SVGRenderer } from "echarts/renderers";
use([
  BarChart, HeatmapChart, LineChart, ScatterChart, DataZoomInsideComponent, DataZoomSliderComponent, GridComponent,
  LegendComponent, TooltipComponent, VisualMapContinuousComponent, SVGRenderer,
]);
export { connect, init } from "echarts/core";
END
node_modules/.bin/esbuild charts.js --bundle --minify --charset=ascii --format=iife --global-name=echarts \
    --legal-comments=inline --define:process.env.NODE_ENV='"production"' --outfile=made.js --log-level=warning \
    --banner:js="/*! A part of Apache ECharts $ECHARTS, as scripts/plot_library.sh makes it. Copyright 2017-2026 The Apache Software Foundation; Apache License 2.0. With zrender, (c) Baidu Inc., and parts of d3, (c) Mike Bostock, both BSD 3-Clause, and tslib, (c) Microsoft, 0BSD. */"
if grep -q '</script\|<!--' made.js; then echo "the library would end the page's script" >&2; exit 1; fi
cp made.js "$target/echarts.min.js"
{
    printf 'echarts.min.js is a part of Apache ECharts %s and what it is built on.\n\n' "$ECHARTS"
    cat node_modules/echarts/NOTICE
    for file in echarts/LICENSE echarts/licenses/LICENSE-d3 zrender/LICENSE tslib/LICENSE.txt; do
        printf '\n\n==== %s ====\n\n' "$file"
        cat "node_modules/$file"
    done
} > "$target/LICENSE-echarts.txt"
