#!/usr/bin/env bash
# build.sh FOLDER: makes kube-apiserver, -controller-manager, -scheduler and kubelet 1.20.2 in FOLDER from Debian's source
# package (Debian itself ships the client alone). About six minutes on two cores and 3 GB while it runs.
# Debian packages: golang-go rsync jq golang-github-modern-go-reflect2-dev golang-github-json-iterator-go-dev
set -euo pipefail
out=$1
programs=(kube-apiserver kube-controller-manager kube-scheduler kubelet)
complete() { for program in "${programs[@]}"; do [ -x "$out/$program" ] || return 1; done; }
complete && exit 0

work=$(mktemp -d "${TMPDIR:-/tmp}/kubernetes-build.XXXXXX")
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/home" "$out"
cd "$work"

# The mirror that this machine's apt uses also has the sources.
policy=$(apt-cache policy base-files)
mirror=$(grep -oE 'https?://[^ ]+' <<<"$policy" | grep -vE 'security|updates' | head -n 1)
echo "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror bookworm main" >sources.list
apt=(apt-get -q -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State::Lists=$work/lists"
    -o APT::Sandbox::User=root)
"${apt[@]}" update
"${apt[@]}" source kubernetes
cd kubernetes-*/

# The vendored reflect2 1.0.1 and json-iterator 1.1.10 crash when Go 1.18 or newer builds them: the server dies of its first
# custom resource. Debian's newer packages of the two take their place.
for module in modern-go/reflect2 json-iterator/go; do
    rm -f "vendor/github.com/$module"/*.{go,s}
    find "/usr/share/gocode/src/github.com/$module" -maxdepth 1 \( -name '*.go' -o -name '*.s' \) ! -name '*_test.go' \
        -exec cp -t "vendor/github.com/$module" {} +
done

export GOPATH="$PWD/.go" GOCACHE="$work/cache" CGO_ENABLED=0 HOME="$work/home" GOPROXY=off GOTOOLCHAIN=local
export KUBE_GIT_VERSION=v1.20.2 KUBE_GIT_COMMIT=debian KUBE_GIT_TREE_STATE=archive
mkdir -p .go/src/k8s.io
ln -s ../../.. .go/src/k8s.io/kubernetes
make WHAT="${programs[*]/#/cmd/}"
for program in "${programs[@]}"; do
    install "_output/local/go/bin/$program" "$out/.$program"
    mv "$out/.$program" "$out/$program"
done
