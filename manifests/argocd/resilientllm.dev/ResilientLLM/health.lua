-- Health of a ResilientLLM in Argo CD. Red (Degraded) is what a person must see to at once: nothing serves that has served or
-- should, or the spec that was synced does not work. What serves with less capacity is on its way back, and not red.
-- No library but the base one is used: Argo CD gives no other to scripts of its ConfigMap.
local status = obj.status
if status == nil or status.conditions == nil or status.observedGeneration ~= obj.metadata.generation then
  return { status = "Progressing", message = "Waits until the operator has seen the present spec." }
end

local conditions = {}
for _, condition in ipairs(status.conditions) do
  conditions[condition.type] = condition
end

local function holds(kind)
  return conditions[kind] ~= nil and conditions[kind].status == "True"
end

local function has_reason(kind, reason)
  return conditions[kind] ~= nil and conditions[kind].reason == reason
end

local function health(code, kind)
  return { status = code, message = conditions[kind] ~= nil and conditions[kind].message or "" }
end

-- What was synced is not done, and nothing will change that but another spec.
if has_reason("Ready", "SpecUnreadable") then
  return health("Degraded", "Ready")
end
if has_reason("Progressing", "RollOutStopped") then
  return health("Degraded", "Progressing")
end

if not holds("Available") then
  if holds("Degraded") then
    return health("Degraded", "Degraded")
  end
  if holds("Stalled") and not has_reason("Stalled", "ObserveOnly") then
    return health("Degraded", "Stalled")
  end
end

if has_reason("Progressing", "Paused") then
  return health("Suspended", "Progressing")
end
if has_reason("Stalled", "ObserveOnly") then
  return health("Suspended", "Stalled")
end
for _, kind in ipairs({ "Stalled", "Degraded", "Progressing" }) do
  if holds(kind) then
    return health("Progressing", kind)
  end
end
if holds("Ready") then
  return health("Healthy", "Ready")
end
return health("Progressing", "Ready")
