// What goes wrong in a run without an error.

import { type Diagnosis, path, type Run, useData } from "./data";
import { Problem } from "./main";
import { href } from "./route";
import { counted, Long } from "./text";

export function DiagnosisPage({ run }: { run: Run }) {
  const { data, error } = useData<Diagnosis>(path("diagnosis", run.name), (found) =>
    found?.unread ? 1000 : run.state === "running" ? 10000 : 0,
  );
  return (
    <section aria-label="Diagnosis">
      {error && <Problem>{error}</Problem>}
      {data && (
        <>
          <p class="soft" role="status">
            {data.findings.length
              ? `${counted(data.findings.length, "thing")} to look at, the gravest first.`
              : "Nothing that is known to go wrong was seen: groups have a signal, limits are wide enough, tools answer."}
            {data.unread > 0 && ` More iterations are being read: ${data.unread}.`}
          </p>
          {data.findings.map((finding) => (
            <article class="card finding" key={finding.name + finding.evidence}>
              <h2>{finding.name.replaceAll("-", " ")}</h2>
              <dl>
                <dt>Seen</dt>
                <dd>
                  <Long text={finding.evidence} />
                </dd>
                <dt>Cure</dt>
                <dd>
                  <Long text={finding.cure} />
                </dd>
              </dl>
              {Object.keys(finding.episodes).length > 0 && (
                <a href={href(["run", run.name, "episodes"], finding.episodes)}>Episodes that show it</a>
              )}
            </article>
          ))}
        </>
      )}
    </section>
  );
}
