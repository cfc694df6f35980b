/** What is shipped for other programs to read: the configuration in the README, and the units of the two ways to watch. */
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';
import { parseConfig } from '../../src/config.js';

const text = (file: string): string =>
  readFileSync(fileURLToPath(new URL(`../../${file}`, import.meta.url)), 'utf8');

/** `Name=value` lines of a unit by section. */
function settings(unit: string): readonly string[] {
  let section = '';
  const list: string[] = [];
  for (const line of unit.split('\n')) {
    if (line.startsWith('[')) section = line;
    else if (line !== '' && !line.startsWith('#')) list.push(`${section} ${line}`);
  }
  return list;
}

it('has a configuration in the README that b2 accepts', async () => {
  const examples = [...text('README.md').matchAll(/```yaml\n(.*?)```/gs)].map((m) => m[1] ?? '');
  expect(examples.length).toBeGreaterThan(0);
  for (const example of examples) {
    const config = await parseConfig(example, 'README.md');
    expect(config['watch.devices']).toHaveLength(2);
  }
});

describe('the units of watch', () => {
  const one = settings(text('packaging/systemd/b2-watch@.service'));
  const all = settings(text('packaging/systemd/b2-watch.service'));

  it('differ only in what is watched', () => {
    const generic = (list: readonly string[]): string[] =>
      list.map((line) => line.replace(/ (of )?%f$/, ''));
    expect(generic(all)).toEqual(generic(one));
    expect(one).toContain('[Service] ExecStart=/usr/local/bin/b2 watch %f');
    expect(all).toContain('[Service] ExecStart=/usr/local/bin/b2 watch');
  });

  it('leave the process that thaws alive until the main one has ended', () => {
    expect(one).toContain('[Service] KillMode=mixed');
  });

  it('shut off neither raw disks nor tracefs nor mounts', () => {
    const names = one.map((line) => line.replace(/^\S+ ([^=]+)=.*$/, '$1'));
    for (const name of names) {
      expect(name).not.toMatch(
        /^(Protect(System|Home|KernelTunables|Proc)|Private\w+|Device\w+|Read\w+Paths|InaccessiblePaths|RootDirectory|DynamicUser)$/,
      );
    }
  });
});
