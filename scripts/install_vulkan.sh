#!/usr/bin/env bash
# Give this machine a Vulkan driver: the loader, Mesa's lavapipe (a CPU device) and the validation layer.
#
#   scripts/install_vulkan.sh
#
# Does nothing where a driver is present. On Debian 12 the packages come from bookworm-backports (Mesa 25.0.7),
# because bookworm's own Mesa 22.3 is too old for the kernels. Where it may not install (no root, no apt), it says
# what is missing and still exits 0: everything but the Vulkan tests works without a driver.
# With VK_KERNELS_REQUIRE=1, as in CI, it exits 1 where the loader, a driver or the validation layer is missing in the
# end: tests that are skipped there would hide what is broken.
set -euo pipefail

required=${VK_KERNELS_REQUIRE:-}
notice() { echo "install_vulkan: $*"; }

# Everything that tells the loader where a driver (ICD) is.
driver_present() {
    [ -n "${VK_DRIVER_FILES:-}${VK_ICD_FILENAMES:-}" ] && return 0
    compgen -G "/usr/share/vulkan/icd.d/*.json" >/dev/null && return 0
    compgen -G "/usr/local/share/vulkan/icd.d/*.json" >/dev/null && return 0
    compgen -G "/etc/vulkan/icd.d/*.json" >/dev/null && return 0
    compgen -G "${XDG_DATA_HOME:-$HOME/.local/share}/vulkan/icd.d/*.json" >/dev/null
}
# Not grep -q: it would leave before ldconfig is done, and pipefail takes that for a failure.
loader_present() { ldconfig -p 2>/dev/null | grep 'libvulkan\.so\.1' >/dev/null; }
layer_present() {
    [ -n "${VK_LAYER_PATH:-}${VK_ADD_LAYER_PATH:-}" ] && return 0
    local folder
    for folder in /usr/share /usr/local/share /etc "${XDG_DATA_HOME:-$HOME/.local/share}"; do
        [ -e "$folder/vulkan/explicit_layer.d/VkLayer_khronos_validation.json" ] && return 0
    done
    return 1
}

# Sets missing_text: what there is not, of what must be there.
find_missing() {
    local missing=()
    loader_present || missing+=("the Vulkan loader (libvulkan1)")
    driver_present || missing+=("a Vulkan driver (a GPU vendor's, or mesa-vulkan-drivers for lavapipe)")
    [ -z "$required" ] || layer_present || missing+=("the validation layer (vulkan-validationlayers)")
    missing_text=""
    [ ${#missing[@]} -eq 0 ] || missing_text=$(printf '%s and ' "${missing[@]}")
    missing_text=${missing_text% and }
}
give_up() {
    notice "NOT INSTALLED: $*"
    [ -z "$required" ] || { notice "VK_KERNELS_REQUIRE=$required: this is an error"; exit 1; }
    exit 0
}

find_missing
if [ -z "$missing_text" ]; then
    notice "the Vulkan loader and a driver are present"
    exit 0
fi

if [ "$(uname -s)" != Linux ] || ! command -v apt-get >/dev/null; then
    give_up "this machine lacks ${missing_text}, and this script installs only with apt"
elif [ "$(id -u)" -eq 0 ]; then
    as_root=()
elif sudo -n true 2>/dev/null; then
    as_root=(sudo -n)
else
    give_up "this machine lacks ${missing_text}; run this script as root to install them"
fi

install() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@" >/dev/null; }

install_packages() {
    local from=()
    . /etc/os-release
    if [ "${VERSION_CODENAME:-}" = bookworm ]; then
        # The same mirror and key as the machine's own list, so that a local mirror keeps working.
        local mirror
        mirror=$(grep -rhoE 'https?://[^ ]+/debian/?( |$)' /etc/apt/sources.list /etc/apt/sources.list.d 2>/dev/null |
            head -n 1 | tr -d ' ' || true)
        "${as_root[@]}" tee /etc/apt/sources.list.d/bookworm-backports.list >/dev/null <<LIST
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] ${mirror:-http://deb.debian.org/debian} bookworm-backports main
LIST
        from=(-t bookworm-backports)
    fi
    "${as_root[@]}" apt-get update -q >/dev/null
    install "${from[@]}" libvulkan1 mesa-vulkan-drivers
    install vulkan-validationlayers || notice "no validation layer to be had: the tests that need it will be skipped"
}

notice "installing ${missing_text}"
install_packages || give_up "apt could not install ${missing_text} (see above)"
find_missing
[ -z "$missing_text" ] || give_up "apt installed its packages, and this machine still lacks ${missing_text}"
notice "installed"
