{{- define "foregate.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 48 | trimSuffix "-" }}
{{- end }}

{{- define "foregate.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 48 | trimSuffix "-" }}
{{- else if contains (include "foregate.name" .) .Release.Name }}
{{- .Release.Name | trunc 48 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "foregate.name" .) | trunc 48 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "foregate.selector" -}}
app.kubernetes.io/name: {{ include "foregate.name" . }}-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "foregate.labels" -}}
{{ include "foregate.selector" . }}
app.kubernetes.io/component: operator
{{ include "foregate.common" . }}
{{- end }}

{{- define "foregate.common" -}}
app.kubernetes.io/part-of: foregate
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "foregate.etcd.selector" -}}
app.kubernetes.io/name: {{ include "foregate.name" . }}-etcd
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "foregate.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "foregate.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "foregate.image" -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end }}

{{- define "foregate.cudaImage" -}}
{{- $tag := default .Chart.AppVersion .Values.image.tag }}
{{- .Values.image.repository }}:{{ default (printf "%s-cuda" $tag) .Values.image.cudaTag }}
{{- end }}

{{- /* URLs of etcd, one a line: of one's own, or of every member, so that a lost one does not cut anybody off. */}}
{{- define "foregate.etcd.urls" -}}
{{- if and .Values.etcd.tls.secretName (not .Values.etcd.external) }}
{{- fail "etcd.tls is for an etcd of your own: name it in etcd.external with https://host:port. The chart's own etcd is plain" }}
{{- end }}
{{- if and (not .Values.etcd.external) (gt (int .Values.etcd.replicas) 1) (not .Values.etcd.persistence.enabled) }}
{{- fail "etcd.replicas 3 goes with etcd.persistence.enabled: a member that comes back empty is not let in again" }}
{{- end }}
{{- range .Values.etcd.external }}
{{- if ne (hasPrefix "https://" .) (not (empty $.Values.etcd.tls.secretName)) }}
{{- fail (printf "etcd.external %s: https goes with etcd.tls.secretName, http without" .) }}
{{- end }}
{{- end }}
{{- if .Values.etcd.external }}
{{- join "\n" .Values.etcd.external }}
{{- else }}
{{- $name := printf "%s-etcd" (include "foregate.fullname" .) }}
{{- $urls := list }}
{{- range $i := until (int .Values.etcd.replicas) }}
{{- $urls = append $urls (printf "http://%s-%d.%s.%s.svc:2379" $name $i $name $.Release.Namespace) }}
{{- end }}
{{- join "\n" $urls }}
{{- end }}
{{- end }}

{{- /* Rules of the operator. A test holds them to the calls that it makes. */}}
{{- define "foregate.rules" -}}
- apiGroups: [foregate.dev]
  resources: [moeclusters]
  verbs: [list, watch]
- apiGroups: [foregate.dev]
  resources: [moeclusters/status, expertplacements/status]
  verbs: [patch]
- apiGroups: [foregate.dev]
  resources: [expertplacements]
  verbs: [get, create, patch]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch, create, delete]
- apiGroups: [""]
  resources: [configmaps, services]
  verbs: [list, create, patch, delete]
- apiGroups: [""]
  resources: [secrets]
  verbs: [get, create, update]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [autoscaling]
  resources: [horizontalpodautoscalers]
  verbs: [list, create, patch, delete]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [list, create, patch, delete]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [list, create, patch, delete]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create, patch]
{{- end }}

{{- /* And where cert-manager issues certificates. */}}
{{- define "foregate.rules.certManager" -}}
- apiGroups: [cert-manager.io]
  resources: [certificates]
  verbs: [create, patch]
{{- end }}
