{{- define "infuse.name" -}}
{{- if contains "infuse" .Release.Name -}}
{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-infuse" .Release.Name | trunc 50 | trimSuffix "-" }}
{{- end -}}
{{- end }}

{{- define "infuse.selector" -}}
app.kubernetes.io/name: infuse
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "infuse.labels" -}}
{{ include "infuse.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "infuse.keysSecret" -}}
{{ .Values.keys.secret | default (printf "%s-keys" (include "infuse.name" .)) }}
{{- end }}

{{- define "infuse.claim" -}}
{{ .Values.store.existingClaim | default (include "infuse.name" .) }}
{{- end }}

{{- /* "true" where several replicas may use one store. */ -}}
{{- define "infuse.shared" -}}
{{- if or (gt (int .Values.replicas) 1) (ne .Values.autoscaling.kind "none") -}}
{{- if not (or .Values.store.bucket (eq .Values.store.accessMode "ReadWriteMany")) -}}
{{- fail "more than one replica needs a store that they can share: set store.bucket, or store.accessMode to ReadWriteMany; or set replicas to 1 and autoscaling.kind to none" -}}
{{- end -}}
true
{{- end -}}
{{- end }}

{{- /* Where the volume with the adapters is mounted. What a replica caches, it keeps to itself. */ -}}
{{- define "infuse.volumePath" -}}
{{ ternary "/store" "/data" (eq (include "infuse.shared" .) "true") }}
{{- end }}

{{- /* The INFUSE_ variables, as a map. Helm reads large numbers as floats: 5.36e+08. */ -}}
{{- define "infuse.environment" -}}
INFUSE_ADAPTERS_DIR: {{ .Values.store.bucket | default (printf "%s/adapters" (include "infuse.volumePath" .)) | quote }}
INFUSE_MERGES_DIR: /data/merges
INFUSE_USAGE_DIR: /data/usage
INFUSE_DRAIN_TIMEOUT: {{ .Values.drainSeconds | quote }}
{{- if .Values.keys.anonymous }}
INFUSE_ALLOW_ANONYMOUS: "true"
{{- else }}
INFUSE_KEYS_FILE: /keys/keys.json
{{- end }}
{{- if .Values.service.adminPort }}
INFUSE_ADMIN_PORT: "8001"
{{- end }}
{{- if .Values.modelClaim }}
INFUSE_MODEL: /model
{{- end }}
{{- if ne .Values.engine "native" }}
INFUSE_ENGINE: {{ .Values.engine }}
{{- end }}
{{- if include "infuse.shared" . }}
INFUSE_SHARED_STORE: "true"
{{- end }}
{{- range $name, $value := .Values.settings }}
INFUSE_{{ $name | replace "-" "_" | upper }}: {{ ternary (toJson $value) (toString $value) (kindIs "float64" $value) | quote }}
{{- end }}
{{- end }}
