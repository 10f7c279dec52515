#!/usr/bin/env bash
# Debian packages that the tests and the demo can use, and why. Nothing else is installed outside .venv.
#   mricron-data   Colin27: one real person's MR, scored as a real external subject of brain-tissue
#   iproute2       a network of its own for the test that nothing leaves the gateway
#   postgresql     the other database of the ledger: tests start a server of their own and throw it away
#   chromium       the browser of the console's tests
#   prometheus     asks the gateway for its metrics and says by rules when something is wrong
#   prometheus-alertmanager  carries that to people; tests and `make up` start both, on loopback
# Where one is absent: the reports say that Colin27 was not scored; tests are skipped by name, or fail if CI=true.
# No service is started, now or at the next boot: `systemctl unmask prometheus` gives Debian's own back.
set -uo pipefail
packages=(mricron-data postgresql iproute2 chromium prometheus prometheus-alertmanager)
missing=()
for name in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$name" 2>/dev/null | grep -q "ok installed" || missing+=("$name")
done
[ ${#missing[@]} -eq 0 ] && exit 0
if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
  echo "NOT INSTALLED: ${missing[*]}, which takes root and apt-get." >&2
  exit 0
fi
echo "installing ${missing[*]} (see deploy/debian.sh for the reasons)" >&2
conf=/etc/postgresql-common/createcluster.conf # no server is started that nobody asked for
[ -e "$conf" ] || { mkdir -p "${conf%/*}" && echo "create_main_cluster = false" >"$conf"; }
policy=/usr/sbin/policy-rc.d
[ -e "$policy" ] || { printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy" && trap 'rm -f "$policy"' EXIT; }
for name in "${missing[@]}"; do
  unit=/etc/systemd/system/$name.service
  case $name in prometheus*) [ -e "$unit" ] || { mkdir -p "${unit%/*}" && ln -sf /dev/null "$unit"; } ;; esac
done
export DEBIAN_FRONTEND=noninteractive UCF_FORCE_CONFFOLD=1
timeout 600 apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null 2>&1 ||
  { timeout 120 apt-get update -qq >/dev/null 2>&1 &&
    timeout 600 apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null 2>&1; } ||
  echo "NOT INSTALLED: ${missing[*]}, since apt-get failed." >&2
exit 0
