import { useCallback, useEffect, useState } from 'react';
import { goToComposer } from './Composer.tsx';
import { ConversationView } from './ConversationView.tsx';
import { openConversation } from './conversation.ts';
import { DevMenu } from './DevMenu.tsx';
import { Icon } from './Icon.tsx';
import { newId } from './ids.ts';
import { createList, routeOf, titleOf } from './list.ts';
import { go, useRoute } from './route.ts';
import { Sidebar } from './Sidebar.tsx';
import { useSession } from './session.ts';
import { useStore } from './store.ts';

export function Page({ onLeave }: { onLeave: () => void }) {
  const session = useSession();
  const route = useRoute();
  const [isOpen, setIsOpen] = useState(false); // the list of conversations, where it is a drawer
  const [list] = useState(() => createList(session.api));
  const { conversations } = useStore(list.state);
  const [fresh, setFresh] = useState(newId); // the id that a new conversation will have
  const id = route ?? fresh;
  const isNew = id === fresh;

  const [conversation, setConversation] = useState(() => openConversation(session, id, isNew, list.refresh));
  if (conversation.id !== id) setConversation(openConversation(session, id, isNew, list.refresh));
  useEffect(() => {
    void conversation.load();
    return conversation.close;
  }, [conversation]);

  useEffect(() => list.follow(), [list]);

  const listed = conversations.find((each) => routeOf(each) === route);
  const title = listed ? titleOf(listed) : '';
  useEffect(() => {
    document.title = title ? `${title} · Anynode` : 'Anynode';
  }, [title]);

  const startNew = useCallback(() => {
    setFresh(newId());
    go(null);
    setIsOpen(false);
  }, []);

  return (
    <div className={isOpen ? 'page open' : 'page'}>
      <button type="button" className="skip" onClick={goToComposer}>
        Skip to the message box
      </button>
      <Sidebar list={list} current={route} onNew={startNew} onChosen={() => setIsOpen(false)} onLeave={onLeave} />
      <button type="button" className="shade" aria-label="Close the list" onClick={() => setIsOpen(false)} />
      <main>
        <header>
          <button
            type="button"
            className="icon drawer"
            aria-label="Conversations"
            aria-expanded={isOpen}
            onClick={() => setIsOpen(!isOpen)}
          >
            <Icon name="list" />
          </button>
          <h1>{title || (isNew ? 'New conversation' : 'Conversation')}</h1>
          <DevMenu />
          <button type="button" className="icon drawer" aria-label="New conversation" onClick={startNew}>
            <Icon name="new" />
          </button>
        </header>
        <ConversationView
          key={conversation.id}
          conversation={conversation}
          onStreaming={list.refresh}
          onAsk={() => route === null && go(id, 'replace')}
        />
      </main>
    </div>
  );
}
