#!/usr/bin/env bash
# Makes a certificate authority and one certificate, for the Dask scheduler, its workers and its clients, into a folder.
# A folder that has an authority already keeps it and gets a new certificate: that is how certificates are renewed.
#
#   make-certificates.sh FOLDER [HOST ...]      hosts are DNS names or IP addresses; localhost is always among them
#
# Whoever holds ca-key.pem can let anybody in: keep it off the cluster. DAYS and CA_DAYS say how long they are valid.
set -euo pipefail
umask 077

if [ $# -lt 1 ]; then
    echo "a folder must be given, got none; run: $0 FOLDER [HOST ...]" >&2
    exit 2
fi
folder=$1
shift
days=${DAYS:-397}
ca_days=${CA_DAYS:-3650}

names=DNS:localhost,IP:127.0.0.1
for host in "$@"; do
    case $host in
        *:*) kind=IP ;;
        *[!0-9.]*) kind=DNS ;;
        *) kind=IP ;;
    esac
    names=$names,$kind:$host
done

mkdir -p "$folder"
work=$(mktemp -d "$folder/.new.XXXXXX")
trap 'rm -rf "$work"' EXIT

if [ -e "$folder/ca.pem" ] && [ ! -e "$folder/ca-key.pem" ]; then
    echo "the authority's key must be beside $folder/ca.pem, got none; fetch ca-key.pem or choose another folder" >&2
    exit 2
fi
if [ ! -e "$folder/ca.pem" ]; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -sha256 -days "$ca_days" \
        -subj "/CN=haloseg Dask authority" -addext "basicConstraints=critical,CA:TRUE,pathlen:0" \
        -addext "keyUsage=critical,keyCertSign,cRLSign" -keyout "$work/ca-key.pem" -out "$work/ca.pem" 2>"$work/log" ||
        { cat "$work/log" >&2; exit 1; }
    mv "$work/ca-key.pem" "$folder/ca-key.pem"
    mv "$work/ca.pem" "$folder/ca.pem"
fi

cat >"$work/extensions" <<END
basicConstraints=critical,CA:FALSE
keyUsage=critical,digitalSignature
extendedKeyUsage=serverAuth,clientAuth
subjectKeyIdentifier=hash
authorityKeyIdentifier=keyid
subjectAltName=$names
END
{
    openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -sha256 -subj "/CN=haloseg Dask" \
        -keyout "$work/dask-key.pem" -out "$work/request.pem"
    openssl x509 -req -in "$work/request.pem" -CA "$folder/ca.pem" -CAkey "$folder/ca-key.pem" -sha256 \
        -set_serial "0x$(openssl rand -hex 16)" -days "$days" -extfile "$work/extensions" -out "$work/dask.pem"
} 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
mv "$work/dask-key.pem" "$folder/dask-key.pem"
mv "$work/dask.pem" "$folder/dask.pem"

echo "made $folder/dask.pem and dask-key.pem, for $names, valid for $days days, by $folder/ca.pem"
