{{- define "resilientllm.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag }}
{{- end -}}
{{- end -}}

{{- /* A JSON list, perhaps empty: what is the default of the program is not said. */ -}}
{{- define "resilientllm.arguments" -}}
{{- $arguments := list -}}
{{- if .Values.watchNamespace -}}
{{- $arguments = append $arguments (printf "--namespace=%s" .Values.watchNamespace) -}}
{{- end -}}
{{- if ne .Values.logLevel "INFO" -}}
{{- $arguments = append $arguments (printf "--log-level=%s" .Values.logLevel) -}}
{{- end -}}
{{- toJson $arguments -}}
{{- end -}}
