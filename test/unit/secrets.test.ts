import { chmodSync, mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { findSecrets, readKeyFile, readPasswordFile } from '../../src/secrets.js';
import { tempDir } from '../support/tmp.js';

const SECRET = 'hunter2-hunter2';
const dir = tempDir();
afterAll(() => dir[Symbol.asyncDispose]());

function file(name: string, text: string, mode = 0o600): string {
  const path = join(dir.path, name);
  writeFileSync(path, text, { mode });
  chmodSync(path, mode);
  return path;
}

describe('secrets', () => {
  it('come from every place that is named, in order', async () => {
    const found = await findSecrets({
      password: SECRET,
      passwordFile: file('pw', 'from file\n'),
      passwordCommand: 'printf "from command\\r\\n"',
      keyFile: file('key', 'b2-key-v1 x\n'),
    });
    expect(found).toEqual([
      { kind: 'password', password: SECRET, source: 'B2_PASSWORD' },
      { kind: 'password', password: 'from file', source: join(dir.path, 'pw') },
      { kind: 'password', password: 'from command', source: 'the password command' },
      {
        kind: 'keyFileText',
        text: 'b2-key-v1 x\n',
        path: join(dir.path, 'key'),
        source: join(dir.path, 'key'),
      },
    ]);
  });

  it('come from the systemd credential or the default key file only where nothing else is named', async () => {
    const credentials = join(dir.path, 'creds');
    mkdirSync(credentials);
    writeFileSync(join(credentials, 'b2-password'), 'credential');
    const defaultKeyFile = file('default', 'b2-key-v1 y\n');
    const all = { credentialsDirectory: credentials, defaultKeyFile };
    expect(await findSecrets(all)).toEqual([
      { kind: 'password', password: 'credential', source: 'the systemd credential b2-password' },
    ]);
    expect(
      await findSecrets({ ...all, credentialsDirectory: join(dir.path, 'none') }),
    ).toMatchObject([{ kind: 'keyFileText', path: defaultKeyFile }]);
    expect(
      await findSecrets({
        credentialsDirectory: join(dir.path, 'none'),
        defaultKeyFile: join(dir.path, 'none'),
      }),
    ).toEqual([]);
    expect(await findSecrets({ ...all, password: SECRET })).toMatchObject([
      { source: 'B2_PASSWORD' },
    ]);
  });

  it('that cannot be had are told without telling what they are', async () => {
    expect(() => readPasswordFile(join(dir.path, 'missing'), 'x')).toThrowError(/missing/);
    expect(() => readPasswordFile(file('empty', '\n'), 'x')).toThrowError(/empty/);
    expect(() => readKeyFile(file('open', `b2-key-v1 ${SECRET}`, 0o644), 'x')).toThrowError(
      /can be read by others.*644/,
    );
    for (const command of [`echo ${SECRET}; exit 3`, 'true', `${SECRET}-no-such-command`]) {
      const error = await findSecrets({ passwordCommand: command }).catch((e: unknown) => e);
      expect(error).toMatchObject({ kind: 'wrong-key', code: 12 });
      expect(`${String(error)} ${JSON.stringify(error)}`).not.toContain(SECRET);
    }
  });
});
