# SPDX-License-Identifier: GPL-2.0-or-later
# Shared by the bash scripts beside it that handle source trees, after common.sh: versions of upstream, pristine
# trees, our overlay of new files and hooks, copies to build in. What is built depends on it, so that the builds'
# keys have its hash, which they need not of common.sh.
# shellcheck shell=bash

# What is meant if no series of versions is named.
declare -A DEFAULT_SERIES=([qemu]=10.0 [linux]=6.12 [kernel]=6.12 [libvirt]=11.3)

# with_series NAME qemu|linux|kernel|libvirt SERIES: NAME-SERIES, or just NAME for the default series, or if
# SERIES is empty.
with_series() {
    case $3 in
    '' | "${DEFAULT_SERIES[$2]}") echo "$1" ;;
    *) echo "$1-$3" ;;
    esac
}

# split_series qemu|linux|kernel|libvirt[=SERIES]: set $name and $series (empty: the default one); fails if it
# is none of these.
split_series() {
    [[ $1 =~ ^(qemu|linux|kernel|libvirt)(=([0-9]+\.[0-9]+))?$ ]] || return 1
    # shellcheck disable=SC2034 # for the caller
    name=${BASH_REMATCH[1]} series=${BASH_REMATCH[3]}
}

# split_variant qemu|kernel|libvirt VARIANT[-SERIES] VARIANTS: set $variant, $series (empty: the default one)
# and $build, the name of the build; fails if it is none of VARIANTS (a pattern).
split_variant() {
    [[ $2 =~ ^($3)(-([0-9]+\.[0-9]+))?$ ]] || return 1
    # shellcheck disable=SC2034 # for the caller
    variant=${BASH_REMATCH[1]} series=${BASH_REMATCH[3]}
    # shellcheck disable=SC2034
    build=$(with_series "$variant" "$1" "$series")
}

# source_dir qemu|linux|libvirt [SERIES]: the pristine tree that fetch left in the cache.
source_dir() {
    local dir
    dir=$(readlink -e "$FPH_CACHE/src/$(with_series "$1" "$1" "${2:-}")") ||
        die "no $1${2:+ $2} source in $FPH_CACHE/src: run scripts/fetch $1${2:+=$2}"
    echo "$dir"
}

# tree_version qemu|kernel|libvirt TREE: upstream's version of a source tree, such as 10.0.13.
tree_version() {
    local version=
    case $1 in
    qemu) [ ! -d "$2/qapi" ] || version=$(cat "$2/VERSION") ;;
    kernel)
        [ ! -d "$2/kernel/sched" ] || version=$(awk -F' *= *' '
            /^(VERSION|PATCHLEVEL|SUBLEVEL) =/ {v = v sep $2; sep = "."}
            END {print v}' "$2/Makefile")
        ;;
    libvirt) [ ! -d "$2/src/qemu" ] || version=$(sed -n "s/^  version: '\(.*\)',/\1/p" "$2/meson.build") ;;
    esac
    [[ $version =~ ^[0-9]+\.[0-9]+ ]] || die "$2 is not a $1 source tree"
    echo "$version"
}

# patches_dir qemu|kernel|libvirt TREE: our hooks for the tree's version.
patches_dir() {
    local version major have
    version=$(tree_version "$1" "$2")
    major=$(cut -d. -f1,2 <<<"$version")
    have=$(cd "$REPO/$1/patches" && echo *)
    [ -d "$REPO/$1/patches/$major" ] ||
        die "$2 is $1 $version; there are hooks for $1 $have only (in $1/patches)"
    echo "$REPO/$1/patches/$major"
}

# series_patches DIR: the patches of a series file, in order.
series_patches() { sed 's/#.*//; s/[[:space:]]*$//; /^$/d' "$1/series"; }

# series_base DIR: the source version that a series was made for (its "# base:" line).
series_base() {
    local base
    base=$(sed -n 's/^# base: *//p' "$1/series")
    echo "${base:-unknown}"
}

# portable_header FROM TO: a uapi header for QEMU. The same substitutions as headers_install in
# Linux and cp_portable in QEMU's scripts/update-linux-headers.sh, as far as ours needs them.
portable_header() {
    sed -e 's/_UAPI_LINUX/_LINUX/' \
        -e 's/__u\([0-9][0-9]*\)/uint\1_t/g' \
        -e 's/__le\([0-9][0-9]*\)/uint\1_t/g' \
        -e 's/<linux\/\([^>]*\)>/"standard-headers\/linux\/\1"/' "$1" >"$2"
}

# new_files qemu|kernel|libvirt DIR: put the overlay's new files into DIR, at their upstream paths.
new_files() {
    local header=linux/virtio_balloon_hint.h
    (cd "$REPO/$1" && find . -path ./patches -prune -o -type f -exec cp --parents -t "$2" {} +)
    if [ "$1" = qemu ] && [ -e "$REPO/kernel/include/uapi/$header" ]; then
        mkdir -p "$2/include/standard-headers/linux"
        portable_header "$REPO/kernel/include/uapi/$header" "$2/include/standard-headers/$header"
    fi
}

# overlay_hash qemu|kernel|libvirt TREE PATH...: the hash of an overlay, as it is for the version of TREE, of what
# applies it, and of other files. What is changed for one version leaves the builds of others alone.
overlay_hash() {
    local patches
    patches=$(patches_dir "$1" "$2")
    content_hash "$1" scripts/overlay scripts/sources.sh "${@:3}" \( -not -path "$1/patches/*" -o -path "${patches#"$REPO"/}/*" \)
}

# start_build DIR: make DIR/build and an empty DIR/build.log. What a killed run left half-written is
# newer than the mark that logged() made and never removed: drop it.
start_build() {
    mkdir -p "$1/build"
    if [ -e "$1/build.log.running" ]; then
        say "the last build was killed: dropping the objects that it wrote"
        find "$1/build" -type f -newer "$1/build.log.running" -name '*.[oa]' -delete
    fi
    : >"$1/build.log"
}

# configure_once "TREE OPTIONS" COMMAND...: configure $build in the current directory, from the start unless it was
# configured by the same before.
configure_once() {
    local config=$1
    shift
    [ "$(cat configured 2>/dev/null)" != "$config" ] || return 0
    find . -mindepth 1 -delete
    say "$build: configuring ${config%% *}"
    logged "$dir/build.log" "configure" "$@"
    echo "$config" >configured
}

# check_options TREE CONFIG FRAGMENT...: the options that the fragments ask for are in a kernel's CONFIG. A later
# fragment has the last word, as in merge_config.sh.
check_options() {
    local tree=$1 config=$2 option missing
    shift 2
    missing=$(sed -n 's/^\(CONFIG_[A-Z0-9_]*=.*\)/\1/p' "$@" |
        awk -F= '{last[$1] = $0} END {for (name in last) print last[name]}' | sort |
        while read -r option; do
            case $option in
            *=n) ! grep -q "^${option%=n}=" "$config" || echo "$option" ;;
            *) grep -qxF "$option" "$config" || echo "$option" ;;
            esac
        done | paste -sd' ')
    [ -z "$missing" ] ||
        die "$(basename "$tree") does not take these options (unknown, or what they need is off): $missing"
}

# copy_source PRISTINE DIR VARIANT MIB: make DIR/src PRISTINE, without another version's remains, with
# MIB of disk for the build. Ours is a copy, for the overlay; stock shares its files with PRISTINE.
copy_source() {
    local how=(-a --reflink=auto) need=$4
    if [ "$(cat "$2/src.version" 2>/dev/null)" = "$(basename "$1")" ]; then
        need_disk "$2" "$need" "building $(basename "$1")"
        return
    fi
    rm -rf "$2/src" "$2/src.version" "$2/build"
    if [ "$3" = stock ]; then
        how=(-al)
    else
        need=$((need + $(du -sm "$1" | cut -f1)))
    fi
    need_disk "$2" "$need" "building $(basename "$1")"
    say "copying $(basename "$1")"
    mkdir "$2/build"
    cp "${how[@]}" "$1" "$2/src"
    basename "$1" >"$2/src.version"
}
