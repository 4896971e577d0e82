#!/usr/bin/env bash
# Opens pages in a headless Chromium, at two widths, light and dark: no error on the console, nothing asked of a network,
# nothing wider than the screen, no finding of axe-core, every chart drawn. Pictures go to FOLDER.
#
#     scripts/audit_page.sh FOLDER PAGE.html...
#
# Needs node, npm and a chromium.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,7p' "$0"; exit 2; }
here="$(cd "$(dirname "$0")" && pwd)"
modules="${AUDIT_MODULES:-$(mktemp -d)}"
[ -d "$modules/node_modules/axe-core" ] ||
    npm install --prefix "$modules" --silent --no-audit --no-fund axe-core@4.14.1 playwright-core@1.65.1
chromium="$(command -v chromium || command -v chromium-browser || command -v google-chrome)"
NODE_PATH="$modules/node_modules" CHROMIUM="$chromium" node "$here/audit_page.cjs" "$@"
